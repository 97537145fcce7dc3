"""Garbage on the bus: one typed error reply, and the next request works."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import msgpack
import pytest
import pytest_asyncio

from services.router.messages import GenerateRequest
from shared import subjects, wire
from shared.bus import Bus
from shared.errors import HTTP_STATUS, MoeError
from tests.running import Stack, Watcher, wait_until
from tests.stack.looking import deployment_of, http, reports

ANSWER_SECONDS = 30
HIDDEN = 256
ROW = ["float32", [1, HIDDEN], b"\0" * 4 * HIDDEN]
PAIR = {
    "token_index": ["int32", [1], b"\0" * 4],
    "expert_index": ["int32", [1], b"\0" * 4],
    "weights": ["float32", [1], b"\0\0\x80\x3f"],
}
CALL = {"v": 1, "layer": 0, "hidden_states": ROW, **PAIR}
FORWARD = {"v": 1, "layer": 0, "hidden_states": ROW}
GENERATE = {"v": 1, "id": "bad", "token_ids": [5, 6], "max_tokens": 2}
ALL_KINDS: dict[str, bytes] = {
    "nothing": b"",
    "no msgpack": b"\xc1",
    "text": b"hello",
    "json": b'{"v": 1}',
    "a number": b"\x05",
    "an empty map": b"\x80",
    "an endless array": b"\xdd\xff\xff\xff\xff",
    "an endless text": b"\xdb\xff\xff\xff\xff",
    "deep nesting": b"\x91" * 200_000,
    "an extension": b"\xc7\x00\x05",
    "noise": random.Random(1).randbytes(5000),
}
BAD_GENERATE: dict[str, dict[str, Any]] = {
    "another version": {"v": 2},
    "no version's type": {"v": "1"},
    "an empty id": {"id": ""},
    "a giant id": {"id": "x" * 1000},
    "no tokens": {"token_ids": []},
    "a negative token": {"token_ids": [-1]},
    "a token out of vocabulary": {"token_ids": [5, 4096]},
    "a giant token": {"token_ids": [2**64 - 1]},
    "tokens as text": {"token_ids": "abc"},
    "negative max_tokens": {"max_tokens": -1},
    "giant max_tokens": {"max_tokens": 2**63},
    "a prompt too long": {"token_ids": [5] * 2000},
    "temperature": {"sampling": {"temperature": float("nan")}},
    "seed": {"sampling": {"seed": -1}},
    "a giant seed": {"sampling": {"seed": 2**64 - 1}},
    "bias": {"sampling": {"logit_bias": {4096: 1.0}}},
    "a negative bias' token": {"sampling": {"logit_bias": {-1: 1.0}}},
    "bias too large": {"sampling": {"logit_bias": {5: 1e9}}},
    "logprobs": {"logprobs": 21},
    "stop tokens": {"stop_token_ids": ["x"]},
    "a flag as text": {"return_logits": "yes"},
}
BAD_TENSORS: dict[str, list[Any]] = {
    "unknown dtype": ["float64", [1, HIDDEN], b"\0" * 8 * HIDDEN],
    "complex": ["complex64", [1, HIDDEN], b"\0" * 8 * HIDDEN],
    "integers": ["int32", [1, HIDDEN], b"\0" * 4 * HIDDEN],
    "wrong width": ["float32", [1, 8], b"\0" * 32],
    "one dimension": ["float32", [HIDDEN], b"\0" * 4 * HIDDEN],
    "too few bytes": ["float32", [1, HIDDEN], b"\0" * 8],
    "too many bytes": ["float32", [1, HIDDEN], b"\0" * 8 * HIDDEN],
    "negative sizes": ["float32", [-1, -HIDDEN], b"\0" * 4 * HIDDEN],
    "a giant": ["float32", [2**40, HIDDEN], b""],
    "an overflow": ["float32", [2**63, 2, HIDDEN], b""],
    "many dimensions": ["float32", [1] * 1000, b"\0" * 4],
    "too few parts": ["float32", [1, HIDDEN]],
    "no bytes": ["float32", [1, HIDDEN], "text"],
}
BAD_CALLS: dict[str, dict[str, Any]] = {
    **{f"hidden states: {name}": {"hidden_states": tensor} for name, tensor in BAD_TENSORS.items()},
    "no such layer": {"layer": 99},
    "a negative layer": {"layer": -1},
    "an expert of another shard": {"expert_index": ["int32", [1], b"\1\0\0\0"]},
    "no such expert": {"expert_index": ["int32", [1], b"\xff\xff\xff\x7f"]},
    "a negative expert": {"expert_index": ["int32", [1], b"\xff\xff\xff\xff"]},
    "a token out of range": {"token_index": ["int32", [1], b"\1\0\0\0"]},
    "a negative token": {"token_index": ["int32", [1], b"\xff\xff\xff\xff"]},
    "indices of another type": {"token_index": ["int64", [1], b"\0" * 8]},
    "more weights than pairs": {"weights": ["float32", [2], b"\0" * 8]},
    "fewer weights than pairs": {"weights": ["float32", [0], b""]},
    "more pairs than experts for the rows": {
        "token_index": ["int32", [100_000], b"\0" * 400_000],
        "expert_index": ["int32", [100_000], b"\0" * 400_000],
        "weights": ["float32", [100_000], b"\0" * 400_000],
    },
}
BAD_FORWARDS: dict[str, dict[str, Any]] = {
    **{f"hidden states: {name}": {"hidden_states": tensor} for name, tensor in BAD_TENSORS.items()},
    "no rows": {"hidden_states": ["float32", [0, HIDDEN], b""]},
    "NaN": {"hidden_states": ["float32", [1, HIDDEN], b"\0\0\xc0\x7f" * HIDDEN]},
    "infinity": {"hidden_states": ["bfloat16", [1, HIDDEN], b"\x80\x7f" * HIDDEN]},
    "no such layer": {"layer": 4},
    "a giant layer": {"layer": 2**64 - 1},
}


@dataclass(frozen=True)
class Target:
    """The bus of the stack, and the subjects of each kind of message."""

    bus: Bus
    generate: str
    forward: str
    experts: str
    worker: str
    control: str

    async def refusal(self, subject: str, data: bytes) -> MoeError:
        """The typed error that `data` on `subject` is answered with."""
        with pytest.raises(MoeError) as caught:
            await self.bus.request(subject, data, timeout=ANSWER_SECONDS)
        return caught.value


@pytest_asyncio.fixture(loop_scope="session")
async def target(stack: Stack, watcher: Watcher) -> AsyncIterator[Target]:
    """After each test the stack must still complete."""
    deployment = await deployment_of(stack)
    await wait_until(lambda: reports(watcher.fleet, "router", deployment), "the router's report")
    (router,) = reports(watcher.fleet, "router", deployment)
    await wait_until(lambda: len(reports(watcher.fleet, "expert", deployment)) == 2, "the workers' reports")
    worker, *_ = [s for s in reports(watcher.fleet, "expert", deployment) if 0 in s.shards]
    yield Target(
        watcher.bus,
        subjects.generate(deployment),
        subjects.forward(deployment),
        subjects.experts(deployment, 0),
        subjects.worker(deployment, worker.instance),
        subjects.control("router", router.instance),
    )
    async with http(stack) as client:
        await completes(client)


async def completes(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/completions", json={"prompt": "import os", "max_tokens": 2, "ignore_eos": True})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 2


def is_clients_fault(error: MoeError) -> bool:
    assert error.message
    assert "Traceback" not in error.message
    return HTTP_STATUS[error.code] == 400


@pytest.mark.parametrize("data", ALL_KINDS.values(), ids=ALL_KINDS)
@pytest.mark.parametrize("kind", ["generate", "forward", "experts", "worker", "control"])
async def test_what_is_no_message_is_refused(target: Target, kind: str, data: bytes) -> None:
    assert (await target.refusal(getattr(target, kind), data)).code == "bad_message"


@pytest.mark.parametrize("change", BAD_GENERATE.values(), ids=BAD_GENERATE)
async def test_a_bad_generate_request_is_refused(target: Target, change: dict[str, Any]) -> None:
    assert is_clients_fault(await target.refusal(target.generate, msgpack.packb({**GENERATE, **change})))


@pytest.mark.parametrize("change", BAD_CALLS.values(), ids=BAD_CALLS)
@pytest.mark.parametrize("kind", ["experts", "worker"])
async def test_a_bad_expert_call_is_refused(target: Target, kind: str, change: dict[str, Any]) -> None:
    error = await target.refusal(getattr(target, kind), msgpack.packb({**CALL, **change}))
    assert error.code == "wrong_shard" or is_clients_fault(error)


@pytest.mark.parametrize("change", BAD_FORWARDS.values(), ids=BAD_FORWARDS)
async def test_a_bad_forward_request_is_refused(target: Target, change: dict[str, Any]) -> None:
    assert is_clients_fault(await target.refusal(target.forward, msgpack.packb({**FORWARD, **change})))


@pytest.mark.parametrize(
    ("kind", "message"),
    [("generate", GENERATE), ("forward", FORWARD), ("experts", CALL), ("control", {"v": 1, "op": "cancel", "id": "x"})],
)
async def test_a_message_cut_short_is_refused(target: Target, kind: str, message: dict[str, Any]) -> None:
    whole = msgpack.packb(message)
    for size in {1, 2, len(whole) // 3, len(whole) // 2, len(whole) - 1}:
        assert (await target.refusal(getattr(target, kind), whole[:size])).code == "bad_message"
    assert (await target.refusal(getattr(target, kind), whole + b"\0")).code == "bad_message"


async def test_good_messages_are_answered(target: Target) -> None:
    """The messages that the other tests spoil are good ones."""
    for subject, message in ((target.forward, FORWARD), (target.experts, CALL), (target.worker, CALL)):
        assert await target.bus.request(subject, msgpack.packb(message), timeout=ANSWER_SECONDS)
    first = await target.bus.request(target.generate, msgpack.packb(GENERATE), timeout=ANSWER_SECONDS)
    assert msgpack.unpackb(first)["instance"]


async def test_an_id_in_use_is_refused_and_the_first_goes_on(target: Target) -> None:
    request = GenerateRequest(id="twice", token_ids=[5], max_tokens=40, ignore_eos=True)
    with target.bus.open_stream() as stream:
        await target.bus.publish(target.generate, wire.encode(request), reply=stream.inbox)
        await stream.next(ANSWER_SECONDS)
        assert is_clients_fault(await target.refusal(target.generate, wire.encode(request)))
        said: dict[str, Any] = {}
        tokens = 0
        while "finish_reason" not in said:
            said = msgpack.unpackb(await stream.next(ANSWER_SECONDS))
            tokens += len(said.get("token_ids", []))
    assert tokens == 40


async def test_messages_without_a_reply_are_survived(target: Target) -> None:
    for subject in (target.generate, target.forward, target.experts, target.worker, target.control):
        for data in (b"", b"\xc1", msgpack.packb(GENERATE), msgpack.packb(CALL), msgpack.packb(FORWARD)):
            await target.bus.publish(subject, data)
    await target.bus.flush()


async def test_a_reply_to_a_services_own_subject_makes_no_loop(target: Target) -> None:
    for subject in (target.generate, target.forward, target.experts):
        for reply in (target.generate, target.forward, target.experts):
            await target.bus.publish(subject, b"\xc1", reply=reply)
            await target.bus.publish(subject, msgpack.packb(FORWARD), reply=reply)
    await target.bus.flush()


async def test_forged_status_reports_are_survived(target: Target, watcher: Watcher) -> None:
    known = {status.instance for status in watcher.fleet.live()}
    for subject in ("moe.status.expert.forged", "moe.status.router.forged", "moe.status.x", "moe.status.a.b.c"):
        for data in (
            b"",
            b"\xc1",
            b"\x91" * 100_000,
            msgpack.packb({"v": 1, "service": "gateway", "instance": "other"}),
        ):
            await target.bus.publish(subject, data)
    await target.bus.flush()
    assert {status.instance for status in watcher.fleet.live()} == known


async def test_headers_out_of_range_are_survived(target: Target) -> None:
    data = msgpack.packb(CALL)
    for budget in ("many", "1e999", "nan", "9" * 400, " "):
        headers = {"Moe-Budget-Ms": budget, "Moe-Request-Id": "x" * 2000}
        assert await target.bus.request(target.experts, data, timeout=ANSWER_SECONDS, headers=headers)
    expired = {"Moe-Budget-Ms": "-1"}
    with pytest.raises(MoeError) as caught:
        await target.bus.request(target.experts, data, timeout=ANSWER_SECONDS, headers=expired)
    assert caught.value.code == "deadline_exceeded"
