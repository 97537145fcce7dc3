"""From a request's body to the router's messages: whatever the types let through can be sent, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from services.gateway.context import Context
from services.gateway.openai_types import CompletionRequest
from services.router.messages import GenerateRequest
from shared import wire
from shared.errors import MoeError
from shared.status import Fleet
from tests.gateway.contexts import context
from tests.running import Watcher


@pytest.fixture(scope="module")
def gateway(watcher: Watcher) -> Context:
    return context(watcher.bus, Fleet())


def requests(gateway: Context, prompts: list[list[int]] | None = None, **parameters: Any) -> list[GenerateRequest]:
    body = CompletionRequest.model_validate({"prompt": "a", **parameters})
    return gateway.requests(body, "cmpl-1", prompts or [[5, 6]], 4)


PARAMETERS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0, 100),
        "top_p": st.floats(0, 1, exclude_min=True),
        "top_k": st.integers(-1, 10**6),
        "min_p": st.floats(0, 1),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0, 100, exclude_min=True),
        "logit_bias": st.dictionaries(st.integers(0, 4095).map(str), st.floats(-100, 100), max_size=4),
        "stop_token_ids": st.lists(st.integers(0, 2**31 - 1), max_size=4),
        "n": st.integers(1, 4),
        "ignore_eos": st.booleans(),
    },
)


@settings(max_examples=150, deadline=None)
@given(PARAMETERS)
def test_a_router_reads_what_the_types_let_through(gateway: Context, parameters: dict[str, Any]) -> None:
    made = requests(gateway, **parameters)
    assert len(made) == parameters.get("n", 1)
    for request in made:
        assert wire.decode(GenerateRequest, wire.encode(request)) == request
        assert request.sampling.temperature == parameters.get("temperature", 1.0)
        assert request.sampling.logit_bias == {int(k): v for k, v in parameters.get("logit_bias", {}).items()}


@pytest.mark.parametrize(
    "parameters",
    [{"top_k": 10**30}, {"logit_bias": {"9" * 5000: 1}}, {"logit_bias": {"4096": 1}}],
    ids=["top_k", "bias with many digits", "bias out of the vocabulary"],
)
def test_a_number_that_no_message_can_carry_is_refused(gateway: Context, parameters: dict[str, Any]) -> None:
    # Either by the body's types, which parse() makes an invalid_request of, or by what the model's vocabulary says.
    with pytest.raises((MoeError, ValidationError), match=r"top_k|logit_bias"):
        requests(gateway, **parameters)


def test_each_choice_has_its_own_id_and_seed(gateway: Context) -> None:
    made = requests(gateway, [[1], [2], [3]], n=3, seed=2**63 - 2)
    assert len({r.id for r in made}) == 9
    assert [r.token_ids for r in made] == [[1]] * 3 + [[2]] * 3 + [[3]] * 3
    assert [r.sampling.seed for r in made] == [2**63 - 2, 2**63 - 1, 0] * 3


def test_without_a_seed_two_requests_differ(gateway: Context) -> None:
    (first,), (second,) = requests(gateway), requests(gateway)
    assert first.sampling.seed != second.sampling.seed


def test_more_generations_than_the_line_takes_are_refused(watcher: Watcher) -> None:
    small = context(watcher.bus, Fleet(), max_concurrent_requests=2, max_queued_requests=3)
    assert len(requests(small, n=5)) == 5
    with pytest.raises(MoeError) as caught:
        requests(small, n=6)
    assert caught.value.code == "overloaded"


@pytest.mark.parametrize("ids", [[], [4096], [5] * 1025], ids=["empty", "out of the vocabulary", "too long"])
def test_prompts_that_cannot_be_computed_are_refused(gateway: Context, ids: list[int]) -> None:
    gateway.check_tokens([5] * 1024)
    with pytest.raises(MoeError):
        gateway.check_tokens(ids)


async def test_text_that_is_not_unicode_is_refused(gateway: Context) -> None:
    with pytest.raises(MoeError, match="not valid Unicode"):
        await gateway.encode("\ud800")


async def test_long_text_gives_the_same_tokens_as_its_tokenizer(gateway: Context) -> None:
    text = "def f(x):\n    return x\n" * 200
    assert await gateway.encode(text) == gateway.tokenizer.encode(text)
