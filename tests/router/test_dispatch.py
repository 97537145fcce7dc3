"""Dispatch over a real nats-server: packing to the bus' limit, the order of sums, retries, recovery, bad replies."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import numpy as np
import pytest
import pytest_asyncio
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nats.aio.msg import Msg

from services.expert.messages import ExpertsReply, ExpertsRequest
from services.monitor.messages import ExpertPlan, SplitExpert
from services.nats_server import binary, free_port
from services.router.calls import Calls
from services.router.dispatch import BusExperts, BusQuestion, Call, combine
from services.router.experts import Experts, LocalExperts
from services.router.splitting import Table, table_of
from shared import subjects, wire
from shared.bus import BUDGET_MS, REQUEST_ID, Bus, deadline
from shared.checkpoint import Checkpoint
from shared.compute import Compute
from shared.errors import MoeError
from shared.experts import ExpertBank
from shared.instrumentation import REGISTRY
from shared.logs import request_id
from shared.replicas import Replicas
from shared.settings import DegradedMode
from shared.status import Status
from shared.tensors import from_wire, to_wire
from tests.oracle import make_checkpoint
from tests.router.configurations import configuration
from tests.running import answers, start, wait_until

HIDDEN = 32
EXPERTS = 6
TOP_K = 2
SMALL_PAYLOAD = 8192
_names = itertools.count()

Handler = Callable[[Msg], Awaitable[bytes]]


@dataclass(frozen=True)
class Layer:
    """One layer's experts, and something to ask them."""

    bank: ExpertBank
    compute: Compute
    hidden: torch.Tensor
    """[T, H]"""
    index: torch.Tensor
    """[T, k]"""
    weights: torch.Tensor
    """[T, k]"""

    async def expected(self) -> torch.Tensor:
        return await asked(LocalExperts(self.bank, self.compute), self)

    async def answer(self, message: Msg) -> bytes:
        """What an honest worker says."""
        request = wire.decode(ExpertsRequest, message.data)
        out = await self.compute(
            self.bank.compute,
            request.layer,
            from_wire(request.hidden_states, "hidden", (None, HIDDEN), ("float32",)),
            from_wire(request.token_index, "tokens", (None,), ("int32",)),
            from_wire(request.expert_index, "experts", (None,), ("int32",)),
            from_wire(request.weights, "weights", (None,), ("float32",)),
        )
        return wire.encode(ExpertsReply(hidden_states=to_wire(out)))


async def asked(experts: Experts, layer: Layer) -> torch.Tensor:
    """The layer's result [T, H]."""
    question = experts.question(0, layer.hidden, layer.index, layer.weights)
    await question.ask()
    return question.result()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def layer(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Layer]:
    """A real layer of a small random checkpoint."""
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("dispatch") / "m", "mixtral"))
    assert (checkpoint.config.hidden_size, checkpoint.config.num_experts) == (HIDDEN, EXPERTS)
    bank = ExpertBank(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    bank.load(range(EXPERTS))
    compute = Compute()
    yield Layer(bank, compute, *pairs(tokens=9, seed=1))
    compute.close()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def small_bus(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bus]:
    """A connection to a server that takes only small messages."""
    folder = tmp_path_factory.mktemp("small-nats")
    port = free_port()
    config = folder / "nats.conf"
    config.write_text(f'listen: "127.0.0.1:{port}"\nmax_payload: {SMALL_PAYLOAD}\n')
    server = await start(folder, "nats-server", binary(), "--config", str(config))
    try:
        await wait_until(lambda: answers(port), "nats-server to listen")
        async with connected(f"nats://127.0.0.1:{port}") as bus:
            yield bus
    finally:
        await server.kill()


def pairs(tokens: int, seed: int, top_k: int = TOP_K) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden [T, H], expert indices [T, k] without repetition in a row, weights [T, k]."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, EXPERTS, generator=generator)
    weights, index = torch.softmax(scores * 3, dim=-1).topk(top_k)
    return torch.randn(tokens, HIDDEN, generator=generator), index, weights


@contextlib.asynccontextmanager
async def connected(url: str) -> AsyncIterator[Bus]:
    bus = await Bus.connect(url, "test", f"dispatch-{next(_names)}")
    try:
        yield bus
    finally:
        await bus.abort()


class Cluster:
    """A deployment of its own: a router's dispatch, and workers that a test writes itself."""

    def __init__(
        self,
        url: str,
        router: Bus,
        layer: Layer,
        shards: int,
        timeout: float,
        recovery: float,
        degraded_mode: DegradedMode = "fail",
    ) -> None:
        self.deployment = f"dispatch-{next(_names)}"
        self.workers = Replicas("expert", self.deployment)
        self.calls = Calls(
            router,
            self.deployment,
            self.workers,
            num_shards=shards,
            timeout_seconds=timeout,
            recovery_seconds=recovery,
        )
        config = configuration(num_local_experts=EXPERTS)
        self.experts = BusExperts(router, config, self.calls, num_shards=shards, degraded_mode=degraded_mode)
        self.asked: list[int] = []
        """The shards that were asked, in order."""
        self.stack = contextlib.AsyncExitStack()
        self._url = url
        self._layer = layer

    async def worker(self, shard: int, handler: Handler | None = None) -> Bus:
        """A worker of `shard` that answers with what `handler` returns; by default honestly."""
        bus = await self.stack.enter_async_context(connected(self._url))

        async def serve(message: Msg) -> None:
            self.asked.append(shard)
            await bus.reply(message, await (handler or self._layer.answer)(message))

        subject, group = subjects.experts(self.deployment, shard), subjects.shard_queue(shard)
        await bus.serve(subject, serve, queue_group=group)
        await bus.serve(subjects.worker(self.deployment, bus.instance), serve, workers=4)
        await bus.flush()
        return bus

    async def reported(self, shard: int, handler: Handler | None = None) -> Bus:
        """A worker of `shard` that is known by its report, and so asked by its own subject."""
        bus = await self.worker(shard, handler)
        self.report(bus, shard)
        return bus

    def report(self, bus: Bus, shard: int) -> None:
        """The worker's report, of this moment."""
        status = Status(
            service="expert", instance=bus.instance, deployment=self.deployment, state="ready", shards=(shard,)
        )
        self.workers.observe(status, time.monotonic())

    async def ask(self) -> torch.Tensor:
        return await asked(self.experts, self._layer)


@contextlib.asynccontextmanager
async def cluster(
    url: str,
    layer: Layer,
    *,
    shards: int = 2,
    timeout: float = 20,
    recovery: float = 10,
    degraded_mode: DegradedMode = "fail",
) -> AsyncIterator[Cluster]:
    async with connected(url) as router:
        made = Cluster(url, router, layer, shards, timeout, recovery, degraded_mode)
        async with made.stack:
            yield made


def retries(reason: str) -> float:
    return REGISTRY.get_sample_value("moe_dispatch_retries_total", {"reason": reason}) or 0.0


def refusing(code: str, times: int, layer: Layer) -> Handler:
    """A handler that refuses with `code` so many times, then answers."""
    left = [times]

    async def handler(message: Msg) -> bytes:
        if left[0]:
            left[0] -= 1
            raise MoeError(code, "not now")
        return await layer.answer(message)

    return handler


# -- packing -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 90),
    shards=st.integers(1, EXPERTS),
    top_k=st.integers(1, EXPERTS),
    seed=st.integers(0, 999),
)
def test_packing_loses_no_pair_and_fits_the_bus(
    small_bus: Bus, tokens: int, shards: int, top_k: int, seed: int
) -> None:
    hidden, index, weights = pairs(tokens, seed, top_k)
    config = configuration(num_local_experts=EXPERTS)
    asking = Calls(small_bus, "d", Replicas("expert", "d"), num_shards=shards, timeout_seconds=1, recovery_seconds=1)
    experts = BusExperts(small_bus, config, asking, num_shards=shards)
    calls = experts.question(0, hidden, index, weights)._calls
    seen = []
    for call in calls:
        assert len(call.data) <= small_bus.max_payload
        request = wire.decode(ExpertsRequest, call.data)
        rows = call.row_numbers.tolist()
        assert rows == sorted(set(rows))
        assert torch.equal(from_wire(request.hidden_states, "h", (None, HIDDEN), ("float32",)), hidden[rows])
        token_index = from_wire(request.token_index, "t", (None,), ("int32",)).tolist()
        assert set(token_index) == set(range(len(rows))), "a row was sent that no pair uses"
        experts_of = from_wire(request.expert_index, "e", (None,), ("int32",)).tolist()
        assert {expert % shards for expert in experts_of} == {call.shard}
        values = from_wire(request.weights, "w", (None,), ("float32",)).tolist()
        seen += [(rows[t], e, w) for t, e, w in zip(token_index, experts_of, values, strict=True)]
    want = [(t, int(index[t, k]), float(weights[t, k])) for t in range(tokens) for k in range(top_k)]
    assert sorted(seen) == sorted(want)
    assert [call.shard for call in calls] == sorted(call.shard for call in calls)
    assert experts.tokens[0].tolist() == torch.bincount(index.flatten(), minlength=EXPERTS).tolist()


async def test_work_over_the_bus_limit_is_split_by_rows_and_really_sent(small_bus: Bus, layer: Layer) -> None:
    many = Layer(layer.bank, layer.compute, *pairs(tokens=200, seed=3))
    assert many.hidden.nbytes > 2 * SMALL_PAYLOAD
    url = str(small_bus._client.connected_url.geturl())
    async with cluster(url, many, shards=2) as c:
        for shard in range(2):
            await c.worker(shard)
        assert torch.allclose(await c.ask(), await many.expected(), atol=1e-5)
        assert c.asked.count(0) > 2
        assert c.asked.count(1) > 2


# -- combining ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2, 3, EXPERTS])
async def test_the_partial_sums_add_up_to_the_layer(nats_url: str, layer: Layer, shards: int) -> None:
    async with cluster(nats_url, layer, shards=shards) as c:
        for shard in range(shards):
            await c.worker(shard)
        out = await c.ask()
        assert out.dtype == layer.hidden.dtype
        assert torch.allclose(out, await layer.expected(), atol=1e-5)
        assert sorted(c.asked) == list(range(shards))


async def test_the_sum_is_the_same_to_the_bit_whichever_shard_answers_first(nats_url: str, layer: Layer) -> None:
    sums = []
    for order in itertools.permutations(range(3)):
        done = [asyncio.Event() for _ in range(3)]

        def answering_in(order: tuple[int, ...], done: list[asyncio.Event], shard: int) -> Handler:
            async def handler(message: Msg) -> bytes:
                turn = order.index(shard)
                if turn:
                    await done[order[turn - 1]].wait()
                done[shard].set()
                return await layer.answer(message)

            return handler

        async with cluster(nats_url, layer, shards=3) as c:
            for shard in range(3):
                await c.worker(shard, answering_in(order, done, shard))
            sums.append(await c.ask())
    assert all(torch.equal(each, sums[0]) for each in sums)


def test_partial_sums_are_added_in_float32_and_rounded_once() -> None:
    parts = [torch.full((1, HIDDEN), value, dtype=torch.bfloat16) for value in (256.0, 1.0, 1.0)]
    calls = [Call(shard, np.array([0]), b"") for shard in range(3)]
    replies = [np.frombuffer(to_wire(part).data, dtype=np.uint8) for part in parts]
    out = combine(torch.zeros(1, HIDDEN, dtype=torch.bfloat16), calls, replies)
    # bfloat16 has 8 bits: adding 1 to 256 twice in it would leave 256.
    assert torch.equal(out, torch.full((1, HIDDEN), 258.0, dtype=torch.bfloat16))


# -- failing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["overloaded", "draining", "wrong_shard", "deadline_exceeded"])
async def test_a_refused_call_is_sent_again(nats_url: str, layer: Layer, code: str) -> None:
    before = retries(code)
    async with cluster(nats_url, layer, shards=1) as c:
        await c.worker(0, refusing(code, 3, layer))
        assert torch.allclose(await c.ask(), await layer.expected(), atol=1e-5)
        assert len(c.asked) == 4
    assert retries(code) - before == 3


async def test_only_the_refused_call_is_sent_again(nats_url: str, layer: Layer) -> None:
    async with cluster(nats_url, layer, shards=2) as c:
        await c.worker(0)
        await c.worker(1, refusing("overloaded", 2, layer))
        assert torch.allclose(await c.ask(), await layer.expected(), atol=1e-5)
        assert sorted(c.asked) == [0, 1, 1, 1]


async def test_a_shard_without_worker_is_waited_for(nats_url: str, layer: Layer) -> None:
    before = retries("no_responders")
    async with cluster(nats_url, layer, shards=2) as c:
        await c.worker(0)
        asking = asyncio.create_task(c.ask(), name="ask")
        await wait_until(lambda: retries("no_responders") > before, "the call to find nobody")
        assert not asking.done()
        await c.worker(1)
        assert torch.allclose(await asking, await layer.expected(), atol=1e-5)


async def test_a_shard_without_worker_is_given_up_after_the_recovery_time(nats_url: str, layer: Layer) -> None:
    async with cluster(nats_url, layer, shards=2, recovery=0.2) as c:
        await c.worker(0)
        with pytest.raises(MoeError, match="shard 1 is unavailable: no worker serves it") as caught:
            await c.ask()
        assert caught.value.code == "shard_unavailable"
        assert caught.value.status == 503


async def test_a_worker_that_never_answers_is_given_up_at_the_deadline(nats_url: str, layer: Layer) -> None:
    silent = asyncio.Event()

    async def handler(message: Msg) -> bytes:
        await silent.wait()
        return await layer.answer(message)

    async with cluster(nats_url, layer, shards=1, timeout=0.3) as c:
        await c.worker(0, handler)
        with pytest.raises(MoeError, match="do not answer") as caught:
            await c.ask()
        assert caught.value.code == "shard_unavailable"


async def test_a_worker_that_always_refuses_is_given_up_at_the_deadline(nats_url: str, layer: Layer) -> None:
    async with cluster(nats_url, layer, shards=1, timeout=0.3) as c:
        await c.worker(0, refusing("overloaded", 10**6, layer))
        with pytest.raises(MoeError, match="overloaded") as caught:
            await c.ask()
        assert caught.value.code == "shard_unavailable"


async def test_a_worker_that_fails_at_a_call_is_not_the_end_of_it(nats_url: str, layer: Layer) -> None:
    async with cluster(nats_url, layer, shards=2) as c:
        await c.worker(0)
        await c.worker(1, refusing("internal_error", 2, layer))
        assert torch.allclose(await c.ask(), await layer.expected(), atol=1e-5)
        assert c.asked.count(1) == 3


async def test_a_call_that_no_worker_can_compute_is_given_up_after_three_tries(nats_url: str, layer: Layer) -> None:
    async with cluster(nats_url, layer, shards=2) as c:
        await c.worker(0)
        await c.worker(1, refusing("bad_message", 10, layer))
        with pytest.raises(MoeError, match="cannot compute") as caught:
            await c.ask()
        assert caught.value.code == "shard_unavailable"
        assert c.asked.count(1) == 3


def reply_with(tensor: torch.Tensor) -> bytes:
    return wire.encode(ExpertsReply(hidden_states=to_wire(tensor)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x81\xa1v\x02",
        reply_with(torch.zeros(1, HIDDEN)),
        reply_with(torch.zeros(9, HIDDEN + 1)),
        reply_with(torch.zeros(9, HIDDEN, dtype=torch.float16)),
        reply_with(torch.zeros(9 * HIDDEN)),
    ],
    ids=["empty", "garbage", "version 2", "too few rows", "width", "dtype", "flat"],
)
async def test_a_bad_reply_is_a_typed_error(nats_url: str, layer: Layer, data: bytes) -> None:
    async def handler(_message: Msg) -> bytes:
        return data

    async with cluster(nats_url, layer, shards=1) as c:
        await c.worker(0, handler)
        with pytest.raises(MoeError) as caught:
            await c.ask()
        assert caught.value.code == "shard_unavailable"


async def test_a_worker_that_leaves_is_replaced_by_its_replica(nats_url: str, layer: Layer) -> None:
    async with cluster(nats_url, layer, shards=1) as c:
        first = await c.worker(0)
        await c.ask()
        await c.worker(0)
        await first.abort()
        for _ in range(5):
            assert torch.allclose(await c.ask(), await layer.expected(), atol=1e-5)


async def test_a_call_carries_its_budget_and_the_requests_that_it_serves(nats_url: str, layer: Layer) -> None:
    headers: list[dict[str, str]] = []

    async def handler(message: Msg) -> bytes:
        headers.append(dict(message.headers or {}))
        return await layer.answer(message)

    async with cluster(nats_url, layer, shards=1, timeout=3) as c:
        await c.worker(0, handler)
        token = request_id.set("req-1,req-2")
        try:
            await c.ask()
        finally:
            request_id.reset(token)
    assert headers[0][REQUEST_ID] == "req-1,req-2"
    assert 0 < int(headers[0][BUDGET_MS]) <= 3000


async def test_a_cancelled_call_leaves_nothing_waiting(nats_url: str, layer: Layer) -> None:
    silent = asyncio.Event()

    async def handler(message: Msg) -> bytes:
        await silent.wait()
        return await layer.answer(message)

    async with connected(nats_url) as router:
        c = Cluster(nats_url, router, layer, 2, 20, 10)
        async with c.stack:
            for shard in range(2):
                await c.worker(shard, handler)
            asking = asyncio.create_task(c.ask(), name="ask")
            await wait_until(lambda: sorted(c.asked) == [0, 1], "both shards to be asked")
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            assert router.waiting == 0
            silent.set()


# -- replicas ----------------------------------------------------------------------------------------------------------


def silent_after(answers: int, layer: Layer, fallen_silent: asyncio.Event) -> Handler:
    """A handler that answers so many calls, and none after them: as a process that was stopped."""
    left = [answers]

    async def handler(message: Msg) -> bytes:
        if not left[0]:
            fallen_silent.set()
            await asyncio.get_running_loop().create_future()
        left[0] -= 1
        return await layer.answer(message)

    return handler


async def test_known_workers_take_turns(nats_url: str, layer: Layer) -> None:
    async with cluster(nats_url, layer, shards=1) as c:
        names: list[str] = []
        for name in ("a", "b"):

            def naming(name: str) -> Handler:
                async def handler(message: Msg) -> bytes:
                    names.append(name)
                    return await layer.answer(message)

                return handler

            await c.reported(0, naming(name))
        for _ in range(6):
            await c.ask()
        assert sorted(names[:2]) == ["a", "b"]
        assert names == names[:2] * 3


async def test_a_worker_that_is_gone_is_found_out_at_once_and_not_asked_again(nats_url: str, layer: Layer) -> None:
    async with cluster(nats_url, layer, shards=1) as c:
        gone = await c.reported(0)
        await c.reported(0)
        await gone.abort()
        before = retries("no_responders")
        for _ in range(4):
            assert torch.allclose(await c.ask(), await layer.expected(), atol=1e-5)
        assert retries("no_responders") - before == 1


async def test_a_call_that_a_worker_took_along_is_answered_by_another(nats_url: str, layer: Layer) -> None:
    fallen_silent = asyncio.Event()
    async with cluster(nats_url, layer, shards=1) as c:
        stopped = await c.reported(0, silent_after(0, layer, fallen_silent))
        await c.reported(0)
        for _ in range(4):
            assert torch.allclose(await c.ask(), await layer.expected(), atol=1e-5)
        assert fallen_silent.is_set()
        assert c.workers.ejections == 1
        assert c.workers.choose(0, time.monotonic()) != stopped.instance


async def test_a_slow_call_is_hedged_within_its_budget(nats_url: str, layer: Layer) -> None:
    fallen_silent = asyncio.Event()
    async with cluster(nats_url, layer, shards=1) as c:
        await c.reported(0, silent_after(20, layer, fallen_silent))
        await c.reported(0)
        while not fallen_silent.is_set():
            assert torch.allclose(await c.ask(), await layer.expected(), atol=1e-5)
        # The latencies of forty calls are known by now: the silent worker's first call does not wait for its verdict.
        assert c.calls.hedges.taken >= 1
        assert c.workers.ejections == 0
        assert c.calls.hedges.taken <= 0.05 * c.calls.hedges.calls + 1


async def test_the_only_worker_stays_in_however_often_it_fails(nats_url: str, layer: Layer) -> None:
    async with cluster(nats_url, layer, shards=1) as c:
        await c.reported(0, refusing("internal_error", 2, layer))
        assert torch.allclose(await c.ask(), await layer.expected(), atol=1e-5)


async def test_an_outage_is_not_made_worse_by_retries(nats_url: str, layer: Layer) -> None:
    async with cluster(nats_url, layer, shards=1, timeout=1) as c:
        await c.reported(0, refusing("overloaded", 10**6, layer))
        results = await asyncio.gather(*(c.ask() for _ in range(40)), return_exceptions=True)
        assert {each.code for each in results if isinstance(each, MoeError)} == {"shard_unavailable"}
        assert c.calls.retries.refused, "the budget was never empty"
        # A fifth of the calls, ten to begin with, and one each second for those who call seldom.
        assert len(c.asked) <= 40 + 0.2 * 40 + 10 + 2


async def test_without_a_shard_its_experts_are_left_out_and_it_is_said(nats_url: str, layer: Layer) -> None:
    async with cluster(nats_url, layer, shards=2, recovery=0.1, degraded_mode="skip") as c:
        await c.worker(0)
        question = c.experts.question(0, layer.hidden, layer.index, layer.weights)
        await question.ask()
        assert question.degraded is not None
        without = layer.index % 2 == 1
        assert torch.equal(question.degraded, without.any(dim=-1))
        kept = layer.weights * ~without
        scale = torch.nan_to_num(layer.weights.sum(-1) / kept.sum(-1), posinf=0.0)[:, None]
        alone = Layer(layer.bank, layer.compute, layer.hidden, layer.index, kept * scale)
        assert torch.allclose(question.result(), await alone.expected(), atol=1e-5)
        await c.worker(1)
        assert torch.allclose(await c.ask(), await layer.expected(), atol=1e-5)


async def test_without_any_shard_nothing_is_left(nats_url: str, layer: Layer) -> None:
    async with cluster(nats_url, layer, shards=2, recovery=0.1, degraded_mode="skip") as c:
        assert not (await c.ask()).any()


async def test_only_the_rows_that_lack_experts_are_scaled(nats_url: str, small_bus: Bus, layer: Layer) -> None:
    many = Layer(layer.bank, layer.compute, *pairs(tokens=200, seed=3))
    url = str(small_bus._client.connected_url.geturl())
    async with cluster(url, many, shards=2, degraded_mode="skip", timeout=3) as c:
        await c.worker(0)
        seen: list[int] = []

        async def some(message: Msg) -> bytes:
            seen.append(len(seen))
            if len(seen) == 1:
                return await many.answer(message)
            raise MoeError("internal_error", "a bug")

        await c.worker(1, some)
        question = c.experts.question(0, many.hidden, many.index, many.weights)
        await question.ask()
        assert question.degraded is not None
        whole = ~question.degraded
        assert 0 < int(whole.sum()) < 200
        assert torch.allclose(question.result()[whole], (await many.expected())[whole], atol=1e-5)


async def test_a_garbled_reply_is_that_workers_fault_and_another_is_asked(nats_url: str, layer: Layer) -> None:
    async def garbled(_message: Msg) -> bytes:
        return b"\xc1"

    async with cluster(nats_url, layer, shards=1) as c:
        await c.reported(0, garbled)
        await c.reported(0)
        for _ in range(4):
            assert torch.allclose(await c.ask(), await layer.expected(), atol=1e-5)


async def test_it_asks_no_longer_than_its_caller_waits(nats_url: str, layer: Layer) -> None:
    async with cluster(nats_url, layer, shards=1) as c:
        start = time.monotonic()
        token = deadline.set(start + 0.3)
        try:
            with pytest.raises(MoeError):
                await c.ask()
        finally:
            deadline.reset(token)
        assert time.monotonic() - start < 8, "not TIMEOUT_SECONDS"


# -- copies ------------------------------------------------------------------------------------------------------------


def split(*experts: SplitExpert, usable: frozenset[int] = frozenset(range(3))) -> Table:
    """Where three shards' tokens go when these experts are split."""
    plan = ExpertPlan(epoch=1, num_shards=3, experts=experts, time=0.0, before=2.0, expected=1.0, reason="")
    table = table_of(plan, 3, EXPERTS, 3, usable)
    assert table is not None
    return table


HALVED = split(
    SplitExpert(layer=0, expert=0, shards=((0, 64), (1, 128), (2, 64))),
    SplitExpert(layer=0, expert=4, shards=((2, 256),)),
)
"""Expert 0, of shard 0, is split among all three; expert 4, of shard 1, is wholly in shard 2."""


def sent(calls: list[Call]) -> list[tuple[int, int, int]]:
    """(row, expert, shard) of all pairs."""
    found = []
    for call in calls:
        request = wire.decode(ExpertsRequest, call.data)
        tokens = from_wire(request.token_index, "t", (None,), ("int32",)).tolist()
        experts = from_wire(request.expert_index, "e", (None,), ("int32",)).tolist()
        found += [(int(call.row_numbers[t]), e, call.shard) for t, e in zip(tokens, experts, strict=True)]
    return sorted(found)


async def test_a_split_expert_is_computed_in_all_of_its_shards_and_the_result_is_the_same(
    nats_url: str, layer: Layer
) -> None:
    many = Layer(layer.bank, layer.compute, *pairs(tokens=60, seed=5))
    async with cluster(nats_url, many, shards=3) as c:
        for shard in range(3):
            await c.worker(shard)
        c.experts.table = HALVED
        question = c.experts.question(0, many.hidden, many.index, many.weights)
        assert isinstance(question, BusQuestion)
        where = sent(question._calls)
        assert {shard for _, expert, shard in where if expert == 0} == {0, 1, 2}
        assert {shard for _, expert, shard in where if expert == 4} == {2}
        assert all(shard == expert % 3 for _, expert, shard in where if expert not in (0, 4))
        assert sorted((row, e) for row, e, _ in where) == sorted(
            (t, int(many.index[t, k])) for t in range(60) for k in range(TOP_K)
        )
        counts = [sum(s == shard for _, _, s in where) for shard in range(3)]
        assert c.experts.shard_tokens[0].tolist() == counts
        await question.ask()
        assert question.degraded is None
        assert torch.allclose(question.result(), await many.expected(), atol=1e-5)


def test_where_a_tokens_pairs_go_does_not_depend_on_the_batch(small_bus: Bus) -> None:
    hidden, index, weights = pairs(tokens=40, seed=8)
    asking = Calls(small_bus, "d", Replicas("expert", "d"), num_shards=3, timeout_seconds=1, recovery_seconds=1)
    experts = BusExperts(small_bus, configuration(num_local_experts=EXPERTS), asking, num_shards=3)
    experts.table = HALVED
    together = sent(experts.question(0, hidden, index, weights)._calls)
    alone = []
    for row in range(40):
        only = slice(row, row + 1)
        calls = experts.question(0, hidden[only], index[only], weights[only])._calls
        alone += [(row, expert, shard) for _, expert, shard in sent(calls)]
    assert sorted(alone) == together


async def test_what_a_shard_has_no_copies_of_is_asked_at_home(nats_url: str, layer: Layer) -> None:
    many = Layer(layer.bank, layer.compute, *pairs(tokens=60, seed=5))

    def hosting(shard: int) -> Handler:
        async def handler(message: Msg) -> bytes:
            request = wire.decode(ExpertsRequest, message.data)
            experts = from_wire(request.expert_index, "e", (None,), ("int32",))
            if (experts % 3 != shard).any():
                raise MoeError("wrong_shard", "an expert is not hosted here")
            return await many.answer(message)

        return handler

    before = REGISTRY.get_sample_value("moe_dispatch_at_home_total") or 0.0
    async with cluster(nats_url, many, shards=3, timeout=30, recovery=30) as c:
        for shard in range(3):
            await c.reported(shard, hosting(shard))
        c.experts.table = HALVED
        assert torch.allclose(await c.ask(), await many.expected(), atol=1e-5)
        assert all(c.workers.choose(shard, time.monotonic()) for shard in range(3)), "nobody is taken for gone"
    assert (REGISTRY.get_sample_value("moe_dispatch_at_home_total") or 0.0) == before + 2


async def test_copies_that_nobody_serves_are_done_without_at_once(nats_url: str, layer: Layer) -> None:
    hot = Layer(layer.bank, layer.compute, layer.hidden, torch.tensor([[0, 3]] * 9), layer.weights)
    async with cluster(nats_url, hot, shards=3, timeout=60, recovery=60) as c:
        await c.worker(0)
        c.experts.table = split(SplitExpert(layer=0, expert=0, shards=((1, 128), (2, 128))))
        async with asyncio.timeout(20):
            assert torch.allclose(await c.ask(), await hot.expected(), atol=1e-5)


async def test_without_a_home_shard_only_its_own_part_is_lost(nats_url: str, layer: Layer) -> None:
    async with cluster(nats_url, layer, shards=3, recovery=0.1, degraded_mode="skip") as c:
        for shard in (0, 2):
            await c.worker(shard)
        c.experts.table = split(SplitExpert(layer=0, expert=4, shards=((2, 256),)))
        question = c.experts.question(0, layer.hidden, layer.index, layer.weights)
        await question.ask()
        without = layer.index == 1
        assert without.any()
        assert (layer.index == 4).any()
        assert question.degraded is not None
        assert torch.equal(question.degraded, without.any(dim=-1))
        kept = layer.weights * ~without
        scale = torch.nan_to_num(layer.weights.sum(-1) / kept.sum(-1), posinf=0.0)[:, None]
        alone = Layer(layer.bank, layer.compute, layer.hidden, layer.index, kept * scale)
        assert torch.allclose(question.result(), await alone.expected(), atol=1e-5)
