"""A worker's answer to one call: right sums for good input, a typed error for any other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import msgpack
import pytest
import torch
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

from services.expert.messages import ExpertsReply, ExpertsRequest
from services.expert.worker import Worker
from shared import wire
from shared.checkpoint import Checkpoint
from shared.errors import MoeError
from shared.experts import shard_experts
from shared.settings import ExpertSettings
from shared.tensors import from_wire, to_wire
from tests.oracle import make_checkpoint

HIDDEN = 32


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """A worker that hosts shard 0 of 2 of a checkpoint whose layer 1 has no experts."""
    path = make_checkpoint(tmp_path_factory.mktemp("worker") / "m", "qwen3-mlp-only-tied")
    settings: dict[str, Any] = {"model": path, "expert_shards": 2}
    made = Worker(ExpertSettings(**settings), Checkpoint.open(path))
    owned = shard_experts(6, 2, 0)
    made._bank.load(owned)
    made._owned = frozenset(owned)
    yield made
    made._compute.close()
    made._stop_metrics()


def tensor(values: Any, dtype: torch.dtype) -> wire.Tensor:
    return to_wire(torch.tensor(values, dtype=dtype))


def request(**changes: Any) -> bytes:
    good: dict[str, Any] = {
        "layer": 0,
        "hidden_states": to_wire(torch.ones(3, HIDDEN)),
        "token_index": tensor([0, 1, 1], torch.int32),
        "expert_index": tensor([0, 2, 4], torch.int32),
        "weights": tensor([0.5, 1.0, 0.25], torch.float32),
    }
    return wire.encode(ExpertsRequest(**{**good, **changes}))


async def answered(worker: Worker, data: bytes) -> torch.Tensor:
    reply = wire.decode(ExpertsReply, (await worker._answer(data, None))[1])
    dtype = reply.hidden_states.dtype
    return from_wire(reply.hidden_states, "hidden_states", (None, HIDDEN), (dtype,))


async def refusal(worker: Worker, data: bytes, deadline: float | None = None) -> MoeError:
    before = (worker._state.tokens, worker._state.calls)
    with pytest.raises(MoeError) as caught:
        await worker._answer(data, deadline)
    assert (worker._state.tokens, worker._state.calls) == before
    return caught.value


async def test_a_good_call_is_answered_with_the_banks_sums(worker: Worker) -> None:
    out = await answered(worker, request())
    index, experts = torch.tensor([0, 1, 1]), torch.tensor([0, 2, 4])
    want = worker._bank.compute(0, torch.ones(3, HIDDEN), index, experts, torch.tensor([0.5, 1.0, 0.25]))
    assert torch.equal(out, want)
    assert not out[2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
async def test_the_answer_has_the_requests_dtype(worker: Worker, dtype: torch.dtype) -> None:
    out = await answered(worker, request(hidden_states=to_wire(torch.ones(3, HIDDEN, dtype=dtype))))
    assert out.dtype == dtype


@pytest.mark.parametrize("rows", [0, 3])
async def test_a_call_without_pairs_is_answered_with_zeros(worker: Worker, rows: int) -> None:
    empty = {
        "token_index": tensor([], torch.int32),
        "expert_index": tensor([], torch.int32),
        "weights": tensor([], torch.float32),
    }
    out = await answered(worker, request(hidden_states=to_wire(torch.ones(rows, HIDDEN)), **empty))
    assert out.shape == (rows, HIDDEN)
    assert not out.any()


BAD: dict[str, dict[str, Any]] = {
    "a layer without experts": {"layer": 1},
    "a layer that is not there": {"layer": 99},
    "hidden states of another width": {"hidden_states": to_wire(torch.ones(3, HIDDEN + 1))},
    "hidden states that are flat": {"hidden_states": to_wire(torch.ones(3 * HIDDEN))},
    "hidden states of integers": {"hidden_states": to_wire(torch.ones(3, HIDDEN, dtype=torch.int32))},
    "a token before the first": {"token_index": tensor([0, 1, -1], torch.int32)},
    "a token after the last": {"token_index": tensor([0, 1, 3], torch.int32)},
    "tokens of another dtype": {"token_index": tensor([0, 1, 1], torch.int64)},
    "more tokens than experts": {"token_index": tensor([0, 1, 1, 1], torch.int32)},
    "experts of another dtype": {"expert_index": tensor([0, 2, 4], torch.int16)},
    "fewer weights": {"weights": tensor([0.5, 1.0], torch.float32)},
    "weights of another dtype": {"weights": tensor([0.5, 1.0, 0.25], torch.float16)},
    "pairs but no rows": {"hidden_states": to_wire(torch.ones(0, HIDDEN))},
}


@pytest.mark.parametrize("changes", BAD.values(), ids=BAD.keys())
async def test_bad_input_is_refused(worker: Worker, changes: dict[str, Any]) -> None:
    assert (await refusal(worker, request(**changes))).code == "bad_message"


@pytest.mark.parametrize("expert", [1, 5, 6, -1, 2**31 - 1])
async def test_an_expert_that_is_not_hosted_is_another_workers_business(worker: Worker, expert: int) -> None:
    error = await refusal(worker, request(expert_index=tensor([0, 2, expert], torch.int32)))
    assert error.code == "wrong_shard"
    assert str(expert) in error.message


async def test_expired_work_is_dropped_before_it_is_looked_at(worker: Worker) -> None:
    assert (await refusal(worker, b"not even a message", deadline=time.monotonic() - 1)).code == "deadline_exceeded"
    assert await worker._answer(request(), time.monotonic() + 60)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        msgpack.packb([1, 2]),
        msgpack.packb({"v": 1}),
        request()[:-1],
        request(layer=0).replace(b"\xa1v\x01", b"\xa1v\x02"),
        msgpack.packb({**msgpack.unpackb(request()), "layer": -1}),
        msgpack.packb({**msgpack.unpackb(request()), "hidden_states": ["float32", [2**62, HIDDEN], b""]}),
        msgpack.packb({**msgpack.unpackb(request()), "hidden_states": ["float32", [3, HIDDEN], b"\0" * 8]}),
        msgpack.packb({**msgpack.unpackb(request()), "weights": ["complex64", [3], b"\0" * 24]}),
    ],
    ids=["empty", "garbage", "a list", "no fields", "truncated", "version", "layer", "giant", "short", "dtype"],
)
async def test_what_is_no_message_is_refused(worker: Worker, data: bytes) -> None:
    assert (await refusal(worker, data)).code == "bad_message"


@example_settings(max_examples=200, deadline=None)
@given(st.data())
async def test_no_damage_to_a_message_is_more_than_a_typed_error(worker: Worker, data: st.DataObject) -> None:
    message = bytearray(request())
    for _ in range(data.draw(st.integers(1, 6))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    try:
        damaged = bytes(message[: data.draw(st.integers(0, len(message)))])
        wire.decode(ExpertsReply, (await worker._answer(damaged, None))[1])
    except MoeError as error:
        assert error.code in {"bad_message", "wrong_shard"}  # noqa: PT017 - most damage hits numbers and is answered


async def test_a_simulating_worker_takes_its_time_for_each_pair_and_answers_zeros(worker: Worker) -> None:
    real = worker._settings
    worker._settings = real.model_copy(update={"simulated_pair_ms": 10.0})
    try:
        start = time.monotonic()
        out = await answered(worker, request())
        assert time.monotonic() - start >= 0.03, "three pairs"
    finally:
        worker._settings = real
    assert out.shape == (3, HIDDEN)
    assert not out.any()
    assert (await answered(worker, request())).any()


async def test_a_copy_is_computed_in_its_layer_alone_and_refused_once_it_is_dropped(worker: Worker) -> None:
    copied = {"expert_index": tensor([0, 2, 3], torch.int32)}
    worker._bank.load([3], lambda _: None, [0])
    worker._copies.held = frozenset([(0, 3)])
    index, experts = torch.tensor([0, 1, 1]), torch.tensor([0, 2, 3])
    want = worker._bank.compute(0, torch.ones(3, HIDDEN), index, experts, torch.tensor([0.5, 1.0, 0.25]))
    assert torch.equal(await answered(worker, request(**copied)), want)
    assert (await refusal(worker, request(layer=2, **copied))).code == "wrong_shard"
    worker._copies.held = frozenset()
    assert (await refusal(worker, request(**copied))).code == "wrong_shard"
    worker._bank.drop([(0, 3)])
    assert (await answered(worker, request())).any()


async def test_copies_for_which_there_is_no_memory_are_refused_with_what_to_do(worker: Worker) -> None:
    worker._check_memory(frozenset([(0, 1), (2, 1)]))
    with (
        mock.patch("services.expert.worker.available_memory", return_value=1000),
        pytest.raises(MemoryError, match=r"2 copies take .* lower REBALANCE_EXTRA_EXPERTS"),
    ):
        worker._check_memory(frozenset([(0, 1), (2, 1)]))
