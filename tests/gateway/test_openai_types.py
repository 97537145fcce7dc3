"""Request bodies: what OpenAI's API takes is taken, everything else is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from services.gateway.openai_types import (
    ChatRequest,
    CompletionRequest,
    DetokenizeBody,
    ForwardBody,
    RouteBody,
    TokenizeBody,
)

USER = {"role": "user", "content": "hello"}
GOOD: list[dict[str, Any]] = [
    {},
    {"model": "demo"},
    {"max_tokens": 5, "temperature": 0, "top_p": 1, "seed": 7},
    {"temperature": 1.5, "top_p": 0.1, "top_k": -1, "min_p": 0.5, "repetition_penalty": 1.1},
    {"presence_penalty": -2, "frequency_penalty": 2, "logit_bias": {"5": -100, "6": 100.0}},
    {"n": 128, "seed": -(2**63)},
    {"stop": "x"},
    {"stop": ["x", "yy"], "stop_token_ids": [0, 7]},
    {"stream": True, "stream_options": {"include_usage": True}},
    {"stream": False, "user": "me", "ignore_eos": True},
    {"max_tokens": None, "temperature": None, "stop": None, "n": None, "seed": None, "logit_bias": None},
    {"some_future_parameter": {"a": 1}},
]
BAD: list[tuple[str, dict[str, Any]]] = [
    ("max_tokens", {"max_tokens": -1}),
    ("max_tokens", {"max_tokens": 1.5}),
    ("max_tokens", {"max_tokens": "5"}),
    ("max_tokens", {"max_tokens": True}),
    ("temperature", {"temperature": -0.1}),
    ("temperature", {"temperature": "hot"}),
    ("top_p", {"top_p": 0}),
    ("top_p", {"top_p": 1.01}),
    ("top_k", {"top_k": -2}),
    ("min_p", {"min_p": 2}),
    ("seed", {"seed": 2**63}),
    ("seed", {"seed": 0.5}),
    ("stop", {"stop": ""}),
    ("stop", {"stop": ["a", ""]}),
    ("stop", {"stop": ["x"] * 17}),
    ("stop", {"stop": [1]}),
    ("stop_token_ids", {"stop_token_ids": [-1]}),
    ("presence_penalty", {"presence_penalty": 2.1}),
    ("frequency_penalty", {"frequency_penalty": -2.1}),
    ("repetition_penalty", {"repetition_penalty": 0}),
    ("logit_bias", {"logit_bias": {"a": 1}}),
    ("logit_bias", {"logit_bias": {"-1": 1}}),
    ("logit_bias", {"logit_bias": {"\u0665": 1}}),
    ("logit_bias", {"logit_bias": {"5": 101}}),
    ("n", {"n": 0}),
    ("n", {"n": 129}),
    ("n", {"n": True}),
    ("stream_options", {"stream_options": {"include_usage": True}}),
    ("stream", {"stream": "perhaps"}),
]


def refusal(kind: type[BaseModel], body: dict[str, Any]) -> str:
    """What is said against `body`, places and reasons."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    return "; ".join(f"{problem['loc']} {problem['msg']}" for problem in caught.value.errors())


@pytest.mark.parametrize("parameters", GOOD, ids=json.dumps)
def test_both_endpoints_take_the_same_parameters(parameters: dict[str, Any]) -> None:
    CompletionRequest.model_validate({"prompt": "a", **parameters})
    ChatRequest.model_validate({"messages": [USER], **parameters})


@pytest.mark.parametrize(("name", "parameters"), BAD, ids=json.dumps)
def test_both_endpoints_refuse_the_same_by_its_name(name: str, parameters: dict[str, Any]) -> None:
    assert name in refusal(CompletionRequest, {"prompt": "a", **parameters})
    assert name in refusal(ChatRequest, {"messages": [USER], **parameters})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty"])
def test_what_is_no_number_is_refused(name: str, value: float) -> None:
    assert name in refusal(CompletionRequest, {"prompt": "a", name: value})


def test_stops_are_a_list_whatever_they_were() -> None:
    stops = [CompletionRequest.model_validate({"prompt": "a", "stop": stop}).stops for stop in (None, "x", ["x", "y"])]
    assert stops == [[], ["x"], ["x", "y"]]


@pytest.mark.parametrize("prompt", ["", "text", ["a", "b"], [1, 2, 3], [[1, 2], [3]], []], ids=json.dumps)
def test_a_prompt_is_a_text_token_ids_or_a_list_of_either(prompt: Any) -> None:
    assert CompletionRequest.model_validate({"prompt": prompt}).prompt == prompt


@pytest.mark.parametrize(
    "prompt", [None, 5, {"a": 1}, [1, "a"], [[1], "a"], [1.5], [-1], [[-1]], [True], [2**31], [[[1]]]], ids=json.dumps
)
def test_any_other_prompt_is_refused(prompt: Any) -> None:
    assert "prompt" in refusal(CompletionRequest, {"prompt": prompt})


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("best_of", {"best_of": 2}),
        ("best_of", {"best_of": 1, "n": 2}),
        ("suffix", {"suffix": "x"}),
        ("logprobs", {"logprobs": -1}),
        ("logprobs", {"logprobs": 21}),
        ("logprobs", {"logprobs": True}),
        ("prompt", {"prompt": None}),
    ],
)
def test_what_completions_cannot_do_is_refused_by_name(name: str, more: dict[str, Any]) -> None:
    assert name in refusal(CompletionRequest, {"prompt": "a", **more})


def test_best_of_as_many_as_are_asked_for_is_nothing_special() -> None:
    assert CompletionRequest.model_validate({"prompt": "a", "best_of": 3, "n": 3, "suffix": ""}).n == 3


# -- chat --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("messages", {}),
        ("messages", {"messages": []}),
        ("messages", {"messages": "hello"}),
        ("messages", {"messages": [{"content": "a"}]}),
        ("messages", {"messages": [{"role": "user", "content": 5}]}),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
        ("top_logprobs", {"messages": [USER], "top_logprobs": 3}),
        ("top_logprobs", {"messages": [USER], "logprobs": True, "top_logprobs": 21}),
        ("max_completion_tokens", {"messages": [USER], "max_completion_tokens": 0}),
    ],
)
def test_a_wrong_conversation_is_refused_by_name(name: str, body: dict[str, Any]) -> None:
    assert name in refusal(ChatRequest, body)


def test_a_message_in_parts_is_their_text() -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    body = ChatRequest.model_validate({"messages": [{"role": "user", "content": parts}]})
    assert body.messages[0].as_template_input() == {"role": "user", "content": "hello"}


def test_a_message_without_content_is_empty_and_keeps_its_other_fields() -> None:
    body = ChatRequest.model_validate({"messages": [{"role": "assistant", "content": None, "name": "x"}]})
    assert body.messages[0].as_template_input() == {"role": "assistant", "content": "", "name": "x"}


# -- the other endpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "body", "name"),
    [
        (ForwardBody, {"layer": -1, "hidden_states": [[1.0]]}, "layer"),
        (ForwardBody, {"layer": 0, "hidden_states": [1.0]}, "hidden_states"),
        (ForwardBody, {"layer": 0}, "hidden_states"),
        (RouteBody, {"prompt": ["a"]}, "prompt"),
        (RouteBody, {}, "prompt"),
        (TokenizeBody, {"prompt": [1]}, "prompt"),
        (DetokenizeBody, {"tokens": [-1]}, "tokens"),
        (DetokenizeBody, {"tokens": "abc"}, "tokens"),
    ],
)
def test_wrong_bodies_of_the_other_endpoints_are_refused_by_name(
    kind: type[BaseModel], body: dict[str, Any], name: str
) -> None:
    assert name in refusal(kind, body)
