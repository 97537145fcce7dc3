"""Streams are read to the last token, and every way in which an answer can be wrong is seen."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from services.benchmark_http import Client
from services.chaos_load import Answer, Choice, Load, StreamReader, ask, difference, questions
from tests.benchmark.servers import DONE, chunked, serving, whole


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [], **fields}).encode() + b"\n\n"


def token(text: str, index: int = 0, finish: str | None = None) -> bytes:
    logprobs = {"tokens": [text], "token_logprobs": [-0.5], "top_logprobs": [{text: -0.5}], "text_offset": [0]}
    return event(choices=[{"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}])


USAGE = event(usage={"prompt_tokens": 3, "completion_tokens": 3})
STREAM = token("a") + token("b", 1) + token("c", finish="length") + token("d", 1, "stop") + USAGE + b"data: [DONE]\n\n"


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_a_stream_is_put_together_however_it_is_cut(size: int) -> None:
    reader = StreamReader()
    for start in range(0, len(STREAM), size):
        reader.take(STREAM[start : start + size])
    assert (reader.done, reader.failure, len(reader.times)) == (True, "", 4)
    assert {n: (c.text, c.finish_reason) for n, c in reader.answer.choices.items()} == {
        0: ("ac", "length"),
        1: ("bd", "stop"),
    }
    assert reader.answer.choices[0].logprobs == [("a", -0.5, {"a": -0.5}), ("c", -0.5, {"c": -0.5})]
    assert (reader.answer.prompt_tokens, reader.answer.completion_tokens) == (3, 3)


def test_a_chat_is_read_as_well() -> None:
    reader = StreamReader()
    content = [{"token": "x", "logprob": -1.0, "top_logprobs": []}]
    reader.take(event(choices=[{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]))
    reader.take(event(choices=[{"index": 0, "delta": {"content": "x"}, "logprobs": {"content": content}}]))
    assert reader.answer.choices[0] == Choice("x", content, None)


def test_errors_in_the_stream_and_bytes_that_are_no_events_are_failures() -> None:
    reader = StreamReader()
    reader.take(token("a") + b'data: {"error": {"code": "bus_unavailable", "message": "gone"}}\n\n')
    assert reader.failure == "in the stream: bus_unavailable: gone"
    for data in (b"data: {\n\n", b'data: {"choices": [{}]}\n\n', b"data: 3\n\n"):
        reader = StreamReader()
        reader.take(data)
        assert reader.failure.startswith("an event cannot be read")


def known() -> Answer:
    logprobs = [("a", -0.5, {"a": -0.5}), ("b", -1.5, {"b": -1.5})]
    return Answer({0: Choice("one two three", logprobs, "length")}, 4, 2)


def changed(change: Callable[[Answer], object]) -> Answer:
    answer = copy.deepcopy(known())
    change(answer)
    return answer


@pytest.mark.parametrize(
    ("change", "how"),
    [
        (lambda a: setattr(a.choices[0], "text", "one two"), "missing tokens at the end"),
        (lambda a: setattr(a.choices[0], "text", "one three"), "missing tokens from character 5"),
        (lambda a: setattr(a.choices[0], "text", "one two two three"), "repeated tokens"),
        (lambda a: setattr(a.choices[0], "text", "one two three four"), "more tokens"),
        (lambda a: setattr(a.choices[0], "text", "one six three"), "other text from character 4"),
        (lambda a: a.choices[0].logprobs.pop(), "missing tokens: 1 logprobs in place of 2"),
        (lambda a: a.choices[0].logprobs.append("x"), "repeated tokens: 3 logprobs"),
        (lambda a: a.choices[0].logprobs.__setitem__(1, ("b", -1.6, {"b": -1.5})), "logprobs differ by 0.1 at token 1"),
        (lambda a: a.choices[0].logprobs.__setitem__(1, ("c", -1.5, {"b": -1.5})), "logprobs differ by inf"),
        (lambda a: setattr(a.choices[0], "finish_reason", "stop"), "finish_reason stop in place of length"),
        (lambda a: a.choices.__setitem__(1, Choice()), "choices [0, 1] in place of [0]"),
        (lambda a: setattr(a, "completion_tokens", 3), "usage: 3 completion_tokens in place of 2"),
    ],
)
def test_every_difference_is_seen(change: Callable[[Answer], object], how: str) -> None:
    assert how in difference(known(), changed(change))
    assert difference(known(), known()) == ""


def test_questions_are_the_same_for_a_seed_and_no_two_alike() -> None:
    asked = questions(5, 24, 8)
    assert asked == questions(5, 24, 8)
    assert len({question.body for question in asked}) == 24
    assert {question.name.split()[0] for question in asked} >= {"greedy", "penalties", "stop", "logprobs", "chat"}
    assert all(json.loads(question.body)["stream"] for question in asked)


async def test_the_load_tells_failures_from_wrong_answers() -> None:
    answers = [0]

    async def answer(_body: bytes, writer: asyncio.StreamWriter) -> None:
        answers[0] += 1
        good = chunked(token("a", finish="length") + USAGE, DONE)
        kinds = [good, good, chunked(token("b", finish="length") + USAGE, DONE), chunked(token("a"))]
        kinds.append(whole(b'{"error": {"message": "full", "code": "overloaded"}}', "429 Too Many"))
        writer.write(kinds[min(answers[0] - 1, 4)])

    async with serving(answer) as url:
        client = Client(url)
        load = Load(client, questions(1, 1, 1), 10, 0)
        await load.learn()
        asked = await load.stream(1, lambda: len(load.asked) >= 4)
        client.close()
    assert [bool(each.wrong) for each in asked] == [False, True, False, False]
    assert [each.failure for each in asked] == [
        "",
        "",
        "the answer ended without [DONE]",
        "HTTP 429: overloaded: full",
    ]
    assert all(len(each.waits()) == 1 + bool(each.failure and each.times) for each in asked)


async def test_a_silent_server_is_a_failure_in_time() -> None:
    async def never(_body: bytes, _writer: asyncio.StreamWriter) -> None:
        return

    async with serving(never) as url:
        client = Client(url)
        asked, _ = await ask(client, questions(1, 1, 1)[0], 0, 0.05)
        client.close()
    assert asked.failure == "not answered within 0.05 s"
