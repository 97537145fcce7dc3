"""What is sent, and how answers are read."""

from __future__ import annotations

import asyncio
import json
import time

import numpy as np
import pytest

from services.benchmark_http import Client
from services.benchmark_requests import BROKEN_OFF, Request, Requests, Sample, ServedModel, Shape, generation, send
from shared.errors import StartError
from tests.benchmark.servers import DONE, TOKEN, USAGE, chunked, event, serving, whole

MODEL = ServedModel("m", max_model_len=64, vocab_size=300, hidden_size=8, moe_layers=[1, 2])


def maker(shape: Shape, *, prompt: int = 16, answer: int = 4, layer: int | None = None, seed: int = 1) -> Requests:
    return Requests(shape, MODEL, prompt_tokens=prompt, max_tokens=answer, seed=seed, layer=layer)


def test_prompts_have_the_length_asked_for_and_stay_in_the_vocabulary() -> None:
    ids = [json.loads(maker("completion")(row, n).body)["prompt"] for row in range(3) for n in range(50)]
    assert {len(each) for each in ids} == {16}
    assert all(0 <= token < 300 for each in ids for token in each)
    assert len({tuple(each) for each in ids}) == 150, "two prompts are alike: a cache could answer"


@pytest.mark.parametrize("shape", ["completion", "chat", "forward"])
def test_a_seed_gives_the_same_requests_again(shape: Shape) -> None:
    assert maker(shape)(1, 7) == maker(shape)(1, 7)
    assert maker(shape)(1, 7).body != maker(shape, seed=2)(1, 7).body


def test_forward_sends_rows_of_float32() -> None:
    request = maker("forward", prompt=3)(0, 0)
    states = np.frombuffer(request.body, "<f4").reshape(3, 8)
    assert np.isfinite(states).all()
    assert np.unique(states).size == 24
    assert (request.path, request.input_tokens) == ("/v1/moe/forward?layer=1", 3)


def test_what_the_model_cannot_do_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(StartError, match="--prompt-tokens 61 and --max-tokens 4 exceed the 64 tokens"):
        maker("completion", prompt=61)
    maker("completion", prompt=60)
    with pytest.raises(StartError, match=r"--layer 0.*\[1, 2\]"):
        maker("forward", layer=0)
    with pytest.raises(StartError, match="needs an OpenMoE gateway"):
        Requests("forward", ServedModel("other"), prompt_tokens=1, max_tokens=1, seed=0, layer=None)


def test_a_server_that_tells_no_vocabulary_gets_ids_that_every_model_has() -> None:
    make = Requests("completion", ServedModel("other"), prompt_tokens=500, max_tokens=1, seed=0, layer=None)
    assert max(json.loads(make(0, 0).body)["prompt"]) < 1000


async def sent(answer: bytes, request: Request | None = None, timeout: float = 10) -> Sample:
    async def give(_body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)

    async with serving(give) as url:
        client = Client(url)
        try:
            return await send(
                client, request or generation("/p", {"prompt": "a"}, None, 2), time.perf_counter(), timeout
            )
        finally:
            client.close()


@pytest.mark.parametrize(
    "pieces",
    [
        (TOKEN, TOKEN, USAGE, DONE),
        (TOKEN + TOKEN + USAGE + DONE,),
        tuple(bytes([b]) for b in TOKEN + TOKEN + USAGE + DONE),
        (TOKEN[:7], TOKEN[7:] + TOKEN + USAGE[:-1], USAGE[-1:] + DONE),
        (TOKEN, event('{"choices":[{"text":"y"}],"usage":{"prompt_tokens":3,"completion_tokens":2}}'), DONE),
    ],
    ids=["an event each", "all at once", "byte by byte", "torn", "usage with the last token"],
)
async def test_a_stream_is_read_however_it_is_cut(pieces: tuple[bytes, ...]) -> None:
    sample = await sent(chunked(*pieces))
    assert (sample.failure, sample.status) == (None, 200)
    assert (len(sample.events), sample.input_tokens, sample.output_tokens) == (2, 3, 2)
    assert sample.sent <= sample.events[0] <= sample.events[1] <= sample.ended


@pytest.mark.parametrize(
    ("answer", "failure", "detail"),
    [
        (chunked(TOKEN, USAGE), BROKEN_OFF, ""),
        (chunked(TOKEN, event('{"error":{"message":"m","code":"shard_unavailable"}}'), DONE), "in the stream: sh", "m"),
        (chunked(TOKEN, event('{"choices":[],"usage":{"prompt_tokens":"many"}}'), DONE), "the stream has an event", ""),
        (whole(b'{"error":{"message":"full","code":"overloaded"}}', "429 No"), "HTTP 429: overloaded", "full"),
        (whole(b"<html>", "502 Bad"), "HTTP 502", "<html>"),
    ],
)
async def test_each_failure_has_its_reason(answer: bytes, failure: str, detail: str) -> None:
    sample = await sent(answer)
    assert sample.failure is not None
    assert sample.failure.startswith(failure)
    assert sample.detail == detail


async def test_an_answer_that_does_not_end_is_left_at_its_deadline() -> None:
    sample = await sent(chunked(TOKEN)[:-5], timeout=0.2)
    assert sample.failure == "not answered within 0.2 s"
    assert len(sample.events) == 1


async def test_answers_that_come_as_one() -> None:
    request = generation("/p", {"prompt": "a"}, None, 2, stream=False)
    body = b'{"choices":[{}],"usage":{"prompt_tokens":3,"completion_tokens":2}}'
    assert (await sent(whole(body), request)).output_tokens == 2
    assert (await sent(whole(b"[]"), request)).failure is not None
    forward = maker("forward")(0, 0)
    assert (await sent(whole(forward.body), forward)).failure is None
    assert (await sent(whole(forward.body[4:]), forward)).failure == "512 bytes were expected, 508 came"
