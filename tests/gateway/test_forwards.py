"""Forward passes over a real nats-server, asked of a router that a test scripts: gathering, splitting, errors, leaving."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable

import numpy as np
import numpy.typing as npt
import pytest
from nats.aio.msg import Msg

from services.gateway.forwards import Answer, Forwards
from services.router.messages import ForwardReply, ForwardRequest
from shared import subjects, wire
from shared.bus import BUDGET_MS, REQUEST_ID, Bus
from shared.checkpoint import Checkpoint
from shared.errors import MoeError
from shared.logs import request_id
from shared.replicas import Replicas
from shared.settings import DEMO_MODEL, GatewaySettings
from tests.running import wait_until

CONFIG = Checkpoint.open(DEMO_MODEL).config
_names = itertools.count()

Script = Callable[["Router", Msg, ForwardRequest], Awaitable[None]]


def row(number: float) -> npt.NDArray[np.float32]:
    return np.full((1, CONFIG.hidden_size), number, np.float32)


class Router:
    """Answers forward requests as `script` says; remembers what it was asked. Its layer doubles the rows."""

    def __init__(self, bus: Bus, script: Script) -> None:
        self.bus = bus
        self.script = script
        self.asked: list[ForwardRequest] = []
        self.headers: list[dict[str, str]] = []
        self.gate = asyncio.Event()

    async def on_forward(self, message: Msg) -> None:
        request = wire.decode(ForwardRequest, message.data)
        self.asked.append(request)
        self.headers.append(dict(message.headers or {}))
        await self.script(self, message, request)

    async def double(self, message: Msg, request: ForwardRequest) -> None:
        hidden = request.hidden_states.to_numpy().astype(np.float32)
        shape = (hidden.shape[0], CONFIG.num_experts_per_tok)
        reply = ForwardReply(
            hidden_states=wire.Tensor.from_numpy(hidden * np.float32(2)),
            top_k_index=wire.Tensor.from_numpy(np.tile(hidden[:, :1].astype(np.int64), shape[1])),
            top_k_weights=wire.Tensor.from_numpy(np.ones(shape, np.float32)),
        )
        await self.bus.reply(message, wire.encode(reply))

    @property
    def rows(self) -> list[int]:
        return [request.hidden_states.shape[0] for request in self.asked]


async def at_once(router: Router, message: Msg, request: ForwardRequest) -> None:
    await router.double(message, request)


async def when_opened(router: Router, message: Msg, request: ForwardRequest) -> None:
    await router.gate.wait()
    await router.double(message, request)


async def never(router: Router, message: Msg, request: ForwardRequest) -> None:
    pass


async def refused(router: Router, message: Msg, request: ForwardRequest) -> None:
    raise MoeError("shard_unavailable", "expert shard 1 is unavailable: no worker serves it")


@contextlib.asynccontextmanager
async def scripted(nats_url: str, script: Script, **changes: float) -> AsyncIterator[tuple[Forwards, Router]]:
    """A gateway's forwards, and a router that answers them."""
    name = next(_names)
    deployment = f"forwards-{name}"
    settings = GatewaySettings(**{"timeout_seconds": 20.0, "forward_wait_ms": 10_000.0, **changes})  # type: ignore[arg-type]
    async with contextlib.AsyncExitStack() as stack:
        buses = [await Bus.connect(nats_url, service, f"{service}-f{name}") for service in ("router", "gateway")]
        for bus in buses:
            stack.push_async_callback(bus.abort)
        router = Router(buses[0], script)
        await buses[0].serve(subjects.forward(deployment), router.on_forward, queue_group="router", workers=8)
        await buses[0].flush()
        forwards = Forwards(buses[1], deployment, CONFIG, Replicas("router", deployment), settings)
        stack.push_async_callback(forwards.close)
        yield forwards, router


def check(answer: Answer, number: float) -> None:
    out, index, weights, _ = answer
    np.testing.assert_array_equal(out, row(2 * number))
    np.testing.assert_array_equal(index, np.full((1, CONFIG.num_experts_per_tok), int(number)))
    assert weights.shape == index.shape


async def test_requests_gather_while_one_is_under_way(nats_url: str) -> None:
    async with scripted(nats_url, when_opened) as (forwards, router):
        first = asyncio.create_task(forwards.small(1, row(0)))
        await wait_until(lambda: router.asked, "the first to be under way")
        later = [asyncio.create_task(forwards.small(1, row(n))) for n in range(1, 40)]
        other_layer = asyncio.create_task(forwards.small(2, row(7)))
        await wait_until(lambda: len(router.asked) == 2, "another layer's not to wait")
        router.gate.set()
        for number, task in enumerate([first, *later]):
            check(await task, number)
        check(await other_layer, 7)
        assert sorted(router.rows) == [1, 1, 39]
        assert [request.layer for request in router.asked] == [1, 2, 1]


async def test_a_single_request_travels_under_its_own_name(nats_url: str) -> None:
    async with scripted(nats_url, at_once) as (forwards, router):
        request_id.set("just-me")
        check(await forwards.small(0, row(3)), 3)
        assert router.headers[0][REQUEST_ID] == "just-me"
        assert 0 < float(router.headers[0][BUDGET_MS]) <= 20_000


async def test_a_full_batch_does_not_wait(nats_url: str) -> None:
    async with scripted(nats_url, when_opened, forward_batch_rows=4) as (forwards, router):
        tasks = [asyncio.create_task(forwards.small(0, row(n))) for n in range(9)]
        await wait_until(lambda: router.rows == [4, 4], "two full batches to leave")
        router.gate.set()
        for number, task in enumerate(tasks):
            check(await task, number)
        assert router.rows == [4, 4, 1]


async def test_large_ones_go_alone_in_as_many_messages_as_the_bus_needs(nats_url: str) -> None:
    async with scripted(nats_url, at_once) as (forwards, router):
        rows = 2 * forwards.max_rows + 5
        hidden = np.arange(rows, dtype=np.float32)[:, None].repeat(CONFIG.hidden_size, 1)
        assert not forwards.is_small(hidden)
        out, index, *_ = await forwards.large(0, hidden)
        np.testing.assert_array_equal(out, 2 * hidden)
        np.testing.assert_array_equal(index[:, 0], np.arange(rows))
        assert router.rows == [forwards.max_rows, forwards.max_rows, 5]


async def test_an_error_reaches_each_of_a_batch_and_the_next_batch_leaves(nats_url: str) -> None:
    async with scripted(nats_url, refused) as (forwards, router):
        results = await asyncio.gather(*(forwards.small(0, row(n)) for n in range(5)), return_exceptions=True)
        errors = [each for each in results if isinstance(each, MoeError)]
        assert [error.code for error in errors] == ["shard_unavailable"] * 5
        assert len(set(map(id, errors))) == 5, "each has an exception of its own"
        router.script = at_once
        check(await forwards.small(0, row(4)), 4)


async def test_without_a_router_it_waits_within_its_time_then_says_so(nats_url: str) -> None:
    async with scripted(nats_url, at_once, timeout_seconds=0.3) as (forwards, router):
        await router.bus.served[0].stop_taking()
        with pytest.raises(MoeError, match="no router is ready") as caught:
            await forwards.small(0, row(1))
        assert caught.value.code == "router_unavailable"


async def test_silence_ends_at_the_deadline_of_the_first(nats_url: str) -> None:
    async with scripted(nats_url, never, timeout_seconds=0.3) as (forwards, _):
        results = await asyncio.gather(*(forwards.small(0, row(n)) for n in range(3)), return_exceptions=True)
        assert [each.code for each in results if isinstance(each, MoeError)] == ["deadline_exceeded"] * 3


async def test_one_that_leaves_does_not_harm_the_others(nats_url: str) -> None:
    async with scripted(nats_url, when_opened) as (forwards, router):
        first = [asyncio.create_task(forwards.small(0, row(n))) for n in range(3)]
        await wait_until(lambda: router.rows == [3], "a batch to be under way")
        second = [asyncio.create_task(forwards.small(0, row(n))) for n in range(10, 13)]
        await asyncio.sleep(0)  # they join
        for task in (first[1], second[0]):
            task.cancel()
        router.gate.set()
        results = await asyncio.gather(*first, *second, return_exceptions=True)
        for number, result in zip((0, 1, 2, 10, 11, 12), results, strict=True):
            if number in {1, 10}:
                assert isinstance(result, asyncio.CancelledError)
            else:
                assert not isinstance(result, BaseException)
                check(result, number)
        assert router.rows == [3, 2], "who left before it was sent is not computed"


async def test_too_many_are_refused_at_once(nats_url: str) -> None:
    limits = {"max_concurrent_requests": 2, "max_queued_requests": 3}
    async with scripted(nats_url, when_opened, **limits) as (forwards, router):
        tasks = [asyncio.create_task(forwards.small(0, row(n))) for n in range(5)]
        await wait_until(lambda: router.asked, "the first to be under way")
        with pytest.raises(MoeError) as caught:
            await forwards.small(0, row(9))
        assert caught.value.code == "overloaded"
        router.gate.set()
        for number, task in enumerate(tasks):
            check(await task, number)
        check(await forwards.small(0, row(9)), 9)


async def test_an_answer_of_another_size_is_an_error(nats_url: str) -> None:
    async def short(router: Router, message: Msg, request: ForwardRequest) -> None:
        less = wire.Tensor.from_numpy(request.hidden_states.to_numpy()[1:])
        await router.double(message, ForwardRequest(layer=0, hidden_states=less))

    async with scripted(nats_url, short) as (forwards, _):
        results = await asyncio.gather(*(forwards.small(0, row(n)) for n in range(3)), return_exceptions=True)
        assert [each.code for each in results if isinstance(each, MoeError)] == ["router_unavailable"] * 3
