"""What docs/protocol.md says of each subject, asked of real processes with nats-py and msgpack alone."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from typing import Any

import msgpack
import nats
import numpy as np
import numpy.typing as npt
import pytest
import pytest_asyncio

from shared.settings import DEMO_MODEL
from tests.protocol.conftest import OwnBus

SECONDS = 30
CONFIG = json.loads((DEMO_MODEL / "config.json").read_text(encoding="utf-8"))
HIDDEN: int = CONFIG["hidden_size"]
LAYERS: int = CONFIG["num_hidden_layers"]
EXPERTS: int = CONFIG["num_experts"]
TOP_K: int = CONFIG["num_experts_per_tok"]
VOCAB: int = CONFIG["vocab_size"]
SHARDS = 2
Array = npt.NDArray[Any]


class Fleet:
    """A client without any code of ours, and what it has heard in the status reports."""

    def __init__(self, client: Any, router: dict[str, Any], workers: dict[str, dict[str, Any]]) -> None:
        self.client = client
        self.deployment = router["deployment"]
        self.router = router
        self.workers = workers
        self._names = iter(range(10**6))

    def subject(self, rest: str) -> str:
        return f"moe.{self.deployment}.{rest}"

    def name(self) -> str:
        return f"exchange-{next(self._names)}"

    async def ask(self, subject: str, message: Any, **headers: str) -> tuple[dict[str, str], Any]:
        """(headers, message) of the one reply."""
        data = message if isinstance(message, bytes) else msgpack.packb(message)
        reply = await self.client.request(subject, data, timeout=SECONDS, headers=headers or None)
        return reply.headers or {}, msgpack.unpackb(reply.data) if reply.data else None

    async def error(self, subject: str, message: Any, **headers: str) -> str:
        """The code of the error reply."""
        answer, data = await self.ask(subject, message, **headers)
        assert data is None, "an error reply has no data"
        assert answer["Nats-Service-Error"].isprintable()
        return answer["Nats-Service-Error-Code"]

    async def stream(self, request: dict[str, Any], **headers: str) -> AsyncIterator[dict[str, Any]]:
        """The chunks of one generation."""
        inbox = self.client.new_inbox()
        replies = await self.client.subscribe(inbox)
        try:
            message = msgpack.packb(request)
            await self.client.publish(self.subject("generate"), message, reply=inbox, headers=headers or None)
            finished = False
            while not finished:
                reply = await replies.next_msg(timeout=SECONDS)
                assert reply.data, reply.headers
                chunk = msgpack.unpackb(reply.data)
                finished = chunk.get("finish_reason") is not None
                yield chunk
        finally:
            await replies.unsubscribe()


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def fleet(own_bus: OwnBus) -> AsyncIterator[Fleet]:
    client = await nats.connect(own_bus.nats_url)
    try:
        routers: list[dict[str, Any]] = []
        workers: dict[str, dict[str, Any]] = {}
        reports = await client.subscribe("moe.status.>")
        async with asyncio.timeout(SECONDS):
            while not routers or {shard for w in workers.values() for shard in w["shards"]} != set(range(SHARDS)):
                message = await reports.next_msg(timeout=SECONDS)
                report = msgpack.unpackb(message.data)
                assert message.subject == f"moe.status.{report['service']}.{report['instance']}"
                if report["service"] == "expert" and report["state"] == "ready":
                    workers[report["instance"]] = report
                elif report["service"] == "router" and report["state"] == "ready":
                    routers.append(report)
        await reports.unsubscribe()
        # The first request starts the client's reply task, which would seem to be left behind by a test.
        await client.request(f"$SRV.PING.openmoe-router.{routers[0]['instance']}", b"", timeout=SECONDS)
        yield Fleet(client, routers[0], workers)
    finally:
        await client.close()


def as_bfloat16(array: Array) -> Array:
    """Float32 numbers made ones that bfloat16 holds, by cutting."""
    cut: Array = (array.view("<u4") & 0xFFFF0000).view("<f4")
    return cut


def tensor(array: Array, dtype: str | None = None) -> list[Any]:
    if dtype == "bfloat16":
        return [dtype, array.shape, (array.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()]
    return [array.dtype.name, array.shape, array.tobytes()]


def numbers(value: list[Any]) -> Array:
    dtype, shape, data = value
    if dtype == "bfloat16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").reshape(shape)
    return np.frombuffer(data, dtype).reshape(shape)


def rows(count: int, seed: int = 3) -> Array:
    return as_bfloat16(np.random.default_rng(seed).normal(size=(count, HIDDEN)).astype("<f4"))


def call(
    hidden: Array, pairs: list[tuple[int, int, float]], *, layer: int = 1, dtype: str | None = None
) -> dict[str, Any]:
    """An ExpertsRequest for (row, expert, weight) pairs."""
    token, expert, weight = zip(*pairs, strict=True) if pairs else ((), (), ())
    return {
        "v": 1,
        "layer": layer,
        "hidden_states": tensor(hidden, dtype),
        "token_index": tensor(np.array(token, "<i4")),
        "expert_index": tensor(np.array(expert, "<i4")),
        "weights": tensor(np.array(weight, "<f4")),
    }


def rounded(array: Array) -> Array:
    """Float32 rounded to bfloat16, to nearest even, as a model in bfloat16 does."""
    bits = array.astype("<f4").view("<u4")
    nearest: Array = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view("<f4")
    return nearest


# -- experts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
async def test_experts_answer_in_the_requests_dtype(fleet: Fleet, dtype: str) -> None:
    hidden = rows(3)
    pairs = [(0, 0, 0.75), (1, 4, 0.5), (2, 2, 1.0)]
    request = call(hidden, pairs, dtype=dtype)
    if dtype == "float16":
        request["hidden_states"] = tensor(hidden.astype("<f2"))
    _, exact = await fleet.ask(fleet.subject("experts.0"), call(hidden, pairs))
    _, reply = await fleet.ask(fleet.subject("experts.0"), request)
    assert reply["hidden_states"][:2] == [dtype, [3, HIDDEN]]
    assert np.allclose(numbers(reply["hidden_states"]), numbers(exact["hidden_states"]), rtol=0.02, atol=0.02)


async def test_an_experts_answer_is_the_weighted_sum_of_its_pairs(fleet: Fleet) -> None:
    hidden = rows(2)
    subject = fleet.subject("experts.1")
    one = numbers((await fleet.ask(subject, call(hidden, [(0, 1, 1.0)])))[1]["hidden_states"])
    other = numbers((await fleet.ask(subject, call(hidden, [(0, 3, 1.0)])))[1]["hidden_states"])
    both = numbers((await fleet.ask(subject, call(hidden, [(0, 3, 0.25), (0, 1, 0.5)])))[1]["hidden_states"])
    assert np.allclose(both[0], 0.5 * one[0] + 0.25 * other[0], rtol=0.02, atol=0.002)
    assert not both[1].any(), "a row without pairs is zero"


async def test_no_rows_and_no_pairs_are_fine(fleet: Fleet) -> None:
    _, reply = await fleet.ask(fleet.subject("experts.0"), call(rows(2), []))
    assert not numbers(reply["hidden_states"]).any()
    _, reply = await fleet.ask(fleet.subject("experts.0"), call(rows(0), []))
    assert reply["hidden_states"] == ["float32", [0, HIDDEN], b""]


async def test_a_worker_answers_on_its_own_subject_as_on_its_shards(fleet: Fleet) -> None:
    for instance, report in fleet.workers.items():
        shard = report["shards"][0]
        request = call(rows(2), [(0, shard, 1.0), (1, shard + SHARDS, 0.5)])
        _, own = await fleet.ask(fleet.subject(f"worker.{instance}"), request)
        _, shared = await fleet.ask(fleet.subject(f"experts.{shard}"), request)
        assert own == shared


async def test_forward_is_the_experts_answers_added_in_the_order_of_shards(fleet: Fleet) -> None:
    hidden = rows(5)
    _, reply = await fleet.ask(fleet.subject("forward"), {"v": 1, "layer": 2, "hidden_states": tensor(hidden)})
    out, index, weights = (numbers(reply[key]) for key in ("hidden_states", "top_k_index", "top_k_weights"))
    assert [reply[key][0] for key in ("hidden_states", "top_k_index", "top_k_weights")] == [
        "float32",
        "int64",
        "float32",
    ]
    assert index.shape == weights.shape == (5, TOP_K)
    total = np.zeros_like(hidden)
    for shard in range(SHARDS):
        pairs = [(t, int(e), float(w)) for t in range(5) for e, w in zip(index[t], weights[t], strict=True)]
        mine = [pair for pair in pairs if pair[1] % SHARDS == shard]
        taken = sorted({t for t, _, _ in mine})
        if mine:
            packed = call(hidden[taken], [(taken.index(t), e, w) for t, e, w in mine], layer=2, dtype="bfloat16")
            _, part = await fleet.ask(fleet.subject(f"experts.{shard}"), packed)
            total[taken] += numbers(part["hidden_states"])
    # Bit by bit: the model is bfloat16, and so are the router's messages.
    assert np.array_equal(rounded(total), out)


async def test_experts_refuse_what_does_not_fit(fleet: Fleet) -> None:
    hidden, subject = rows(2), fleet.subject("experts.0")
    good = call(hidden, [(0, 0, 1.0)])
    wrong: dict[str, dict[str, Any]] = {
        "a layer beyond the last": {"layer": 99},
        "another hidden size": {"hidden_states": tensor(np.zeros((2, 8), "<f4"))},
        "hidden states in one dimension": {"hidden_states": tensor(np.zeros(HIDDEN, "<f4"))},
        "hidden states of integers": {"hidden_states": tensor(np.zeros((2, HIDDEN), "<i4"))},
        "a row beyond the last": {"token_index": tensor(np.array([2], "<i4"))},
        "a negative row": {"token_index": tensor(np.array([-1], "<i4"))},
        "rows as int64": {"token_index": tensor(np.array([0], "<i8"))},
        "more weights than pairs": {"weights": tensor(np.ones(2, "<f4"))},
        "weights as float16": {"weights": tensor(np.ones(1, "<f2"))},
        "version 2": {"v": 2},
    }
    for name, change in wrong.items():
        assert await fleet.error(subject, {**good, **change}) == "bad_message", name
    for raw in (b"", b"\xc1", msgpack.packb(good)[:-1], msgpack.packb(good) + b"\0", msgpack.packb([good])):
        assert await fleet.error(subject, raw) == "bad_message"
    for expert in (1, -2, EXPERTS, 2**31 - 1):
        assert await fleet.error(subject, call(hidden, [(0, expert, 1.0)])) == "wrong_shard"
    assert (await fleet.ask(subject, good))[1] is not None, "the next call works"


async def test_work_whose_budget_has_ended_is_not_computed(fleet: Fleet) -> None:
    good = call(rows(1), [(0, 0, 1.0)])
    assert await fleet.error(fleet.subject("experts.0"), good, **{"Moe-Budget-Ms": "0"}) == "deadline_exceeded"
    forward = {"v": 1, "layer": 0, "hidden_states": tensor(rows(1))}
    assert await fleet.error(fleet.subject("forward"), forward, **{"Moe-Budget-Ms": "0"}) == "deadline_exceeded"
    for unreadable in ("soon", "1e9"):
        _, reply = await fleet.ask(fleet.subject("experts.0"), good, **{"Moe-Budget-Ms": unreadable})
        assert reply is not None


async def test_a_budget_is_counted_from_the_arrival_not_from_the_turn(fleet: Fleet) -> None:
    instance, report = next(iter(fleet.workers.items()))
    shard = report["shards"][0]
    mine = [expert for expert in range(EXPERTS) if expert % SHARDS == shard][:2]  # no more than a token takes
    heavy = msgpack.packb(call(rows(4000), [(row, expert, 1.0) for row in range(4000) for expert in mine]))
    for _ in range(12):  # 49 MB: from 64 on the server takes a reader that is behind for lost
        await fleet.client.publish(fleet.subject(f"worker.{instance}"), heavy)
    request = call(rows(1), [(0, shard, 1.0)])
    code = await fleet.error(fleet.subject(f"worker.{instance}"), request, **{"Moe-Budget-Ms": "50"})
    assert code == "deadline_exceeded"


async def test_nobody_listens_on_a_shard_that_does_not_exist(fleet: Fleet) -> None:
    with pytest.raises(nats.errors.NoRespondersError):
        await fleet.ask(fleet.subject(f"experts.{SHARDS}"), call(rows(1), [(0, 0, 1.0)]))


# -- forward ---------------------------------------------------------------------------------------------------------


async def test_forward_refuses_what_does_not_fit(fleet: Fleet) -> None:
    subject = fleet.subject("forward")
    infinite = rows(1)
    infinite[0, 5] = math.inf
    for name, code, layer, hidden in (
        ("a layer beyond the last", "invalid_request", LAYERS, rows(1)),
        ("no rows", "invalid_request", 0, rows(0)),
        ("infinity", "invalid_request", 0, infinite),
        ("another hidden size", "bad_message", 0, rows(1)[:, :8]),
        ("integers", "bad_message", 0, rows(1).astype("<i4")),
    ):
        request = {"v": 1, "layer": layer, "hidden_states": tensor(np.ascontiguousarray(hidden))}
        assert await fleet.error(subject, request) == code, name
    assert await fleet.error(subject, b"\x81") == "bad_message"


async def test_an_answer_that_the_bus_does_not_carry_is_an_error_at_once(fleet: Fleet) -> None:
    # In bfloat16 the request fits, but the answer is float32.
    count = fleet.client.max_payload // (2 * HIDDEN) - 64
    request = {"v": 1, "layer": 0, "hidden_states": tensor(np.zeros((count, HIDDEN), "<f4"), "bfloat16")}
    assert await fleet.error(fleet.subject("forward"), request) == "payload_too_large"


# -- generate --------------------------------------------------------------------------------------------------------


async def test_a_generation_is_announced_streamed_and_ended(fleet: Fleet) -> None:
    request = {"v": 1, "id": fleet.name(), "token_ids": [489, 889, 65], "max_tokens": 5, "ignore_eos": True}
    chunks = [chunk async for chunk in fleet.stream(request)]
    assert all(chunk["id"] == request["id"] for chunk in chunks)
    assert chunks[0]["instance"] == fleet.router["instance"]
    assert "token_ids" not in chunks[0]
    assert len([token for chunk in chunks for token in chunk.get("token_ids", [])]) == 5
    assert [chunk.get("finish_reason") for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


async def test_a_stream_goes_on_from_its_tokens_as_if_nothing_had_happened(fleet: Fleet) -> None:
    request = {"v": 1, "token_ids": [489, 889, 65], "ignore_eos": True, "sampling": {"seed": 11, "top_k": 3}}

    async def tokens(prompt: list[int], count: int) -> list[int]:
        own = {**request, "id": fleet.name(), "token_ids": prompt, "max_tokens": count}
        return [token async for chunk in fleet.stream(own) for token in chunk.get("token_ids", [])]

    whole = await tokens([489, 889, 65], 8)
    assert await tokens([489, 889, 65, *whole[:4]], 4) == whole[4:]


async def test_a_stop_token_is_reported_and_named(fleet: Fleet) -> None:
    request = {"v": 1, "token_ids": [489, 889, 65], "max_tokens": 4, "sampling": {"temperature": 0}}
    free = [c async for c in fleet.stream({**request, "id": fleet.name()})]
    stop = next(token for chunk in free for token in chunk.get("token_ids", []))
    chunks = [c async for c in fleet.stream({**request, "id": fleet.name(), "stop_token_ids": [stop]})]
    assert chunks[-1]["finish_reason"] == "stop"
    assert chunks[-1]["stop_token_id"] == stop
    assert chunks[-1]["token_ids"][-1] == stop


async def test_extras_come_in_the_shapes_that_are_specified(fleet: Fleet) -> None:
    prompt, new = [489, 889, 65, 472], 3
    request = {
        "v": 1,
        "id": fleet.name(),
        "token_ids": prompt,
        "max_tokens": new,
        "ignore_eos": True,
        "sampling": {"temperature": 0, "logit_bias": {5: -100.0}},
        "logprobs": 2,
        "prompt_logprobs": 1,
        "return_logits": True,
        "return_prompt_logits": True,
        "return_routing": True,
    }
    chunks = [chunk async for chunk in fleet.stream(request)]

    def joined(key: str) -> Array:
        return np.concatenate([numbers(chunk[key]) for chunk in chunks if chunk.get(key) is not None])

    tokens = [token for chunk in chunks for token in chunk.get("token_ids", [])]
    logits, prompt_logits, routing = joined("logits"), joined("prompt_logits"), joined("routing")
    assert logits.shape == (new, VOCAB)
    assert prompt_logits.shape == (len(prompt), VOCAB)
    assert routing.shape == (len(prompt) + new - 1, LAYERS, TOP_K)
    assert np.array_equal(prompt_logits[-1], logits[0]), "the last prompt position chooses the first token"
    logprobs = [item for chunk in chunks for item in chunk.get("logprobs", [])]
    for token, (chosen, logprob, rank, top), row in zip(tokens, logprobs, logits, strict=True):
        assert chosen == token
        assert rank == 1 + int((row > row[token]).sum())
        # By value: in bfloat16 two tokens may be exactly as likely.
        assert [row[pair[0]] for pair in top] == sorted(row, reverse=True)[:2]
        assert logprob == pytest.approx(float(row[token] - np.log(np.exp(row.astype("f8")).sum())), abs=1e-4)
    prompt_logprobs = [chunk["prompt_logprobs"] for chunk in chunks if chunk.get("prompt_logprobs") is not None]
    assert len(prompt_logprobs) == 1
    assert prompt_logprobs[0][0] is None
    assert [item[0] for item in prompt_logprobs[0][1:]] == prompt[1:]


async def test_a_prompt_alone_can_be_computed(fleet: Fleet) -> None:
    request = {"v": 1, "id": fleet.name(), "token_ids": [489, 889], "max_tokens": 0, "prompt_logprobs": 0}
    chunks = [chunk async for chunk in fleet.stream(request)]
    assert chunks[-1]["finish_reason"] == "length"
    assert not [token for chunk in chunks for token in chunk.get("token_ids", [])]
    assert len(chunks[-1]["prompt_logprobs"]) == 2


async def test_generate_refuses_what_does_not_fit(fleet: Fleet) -> None:
    subject, good = fleet.subject("generate"), {"v": 1, "id": fleet.name(), "token_ids": [5], "max_tokens": 1}
    for change, code in (
        ({"token_ids": [VOCAB]}, "invalid_request"),
        ({"sampling": {"logit_bias": {VOCAB: 1.0}}}, "invalid_request"),
        ({"max_tokens": fleet.router["max_model_len"]}, "context_length_exceeded"),
        ({"token_ids": []}, "bad_message"),
        ({"sampling": {"top_p": 0}}, "bad_message"),
        ({"v": 2}, "bad_message"),
    ):
        assert await fleet.error(subject, {**good, **change}) == code, change
    assert [c async for c in fleet.stream(good)][-1]["finish_reason"] in ("length", "stop")


async def test_an_id_in_use_is_refused_and_a_cancelled_stream_says_so(fleet: Fleet) -> None:
    request = {"v": 1, "id": fleet.name(), "token_ids": [489], "max_tokens": 900, "ignore_eos": True}
    control = f"moe.control.router.{fleet.router['instance']}"
    chunks = []
    async for chunk in fleet.stream(request):
        chunks.append(chunk)
        if len(chunks) == 2:
            assert await fleet.error(fleet.subject("generate"), request) == "invalid_request"
            _, reply = await fleet.ask(control, {"v": 1, "op": "cancel", "id": request["id"]})
            assert reply == {"v": 1, "found": True}
    assert chunks[-1]["finish_reason"] == "cancelled"
    assert len(chunks) < 900
    _, reply = await fleet.ask(control, {"id": request["id"]})
    assert reply["found"] is False
    assert await fleet.error(control, {"v": 1, "op": "drain", "id": "x"}) == "bad_message"


# -- discovery -------------------------------------------------------------------------------------------------------


async def test_every_instance_answers_discovery(fleet: Fleet) -> None:
    for instance in fleet.workers:
        kinds = {"PING": "ping", "INFO": "info", "STATS": "stats"}
        for verb, kind in kinds.items():
            subject = f"$SRV.{verb}.openmoe-expert.{instance}"
            reply = json.loads((await fleet.client.request(subject, b"", timeout=SECONDS)).data)
            assert reply["type"] == f"io.nats.micro.v1.{kind}_response"
            assert (reply["name"], reply["id"]) == ("openmoe-expert", instance)
        info = json.loads(
            (await fleet.client.request(f"$SRV.INFO.openmoe-expert.{instance}", b"", timeout=SECONDS)).data
        )
        offered = {endpoint["subject"] for endpoint in info["endpoints"]}
        shards = {fleet.subject(f"experts.{shard}") for shard in fleet.workers[instance]["shards"]}
        assert offered == {fleet.subject(f"worker.{instance}"), *shards}
    inbox = fleet.client.new_inbox()
    replies = await fleet.client.subscribe(inbox)
    await fleet.client.publish("$SRV.PING", b"", reply=inbox)
    names = {json.loads((await replies.next_msg(timeout=SECONDS)).data)["name"] for _ in range(6)}
    await replies.unsubscribe()
    assert names == {f"openmoe-{name}" for name in ("gateway", "router", "expert", "monitor", "supervisor")}
