"""The simulated server does what the real one does, and the loop's processes stop, resume and die as real ones do."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from unittest import mock

import pytest
from nats.aio.msg import Msg

import shared.bus as bus_module
from shared.bus import Bus, NoRespondersError
from shared.errors import MoeError
from tests.simulation.loop import START, Process, SimulatedLoop, simulated_time
from tests.simulation.nats import SimulatedConnection, SimulatedServer


class Net:
    """A server, and processes that speak to it."""

    def __init__(self) -> None:
        self.loop = SimulatedLoop()
        self.server = SimulatedServer(self.loop, random.Random(1), lambda _: None, latency=0.001, spikes=0.0)
        self.processes: list[Process] = []

    def process(self, name: str) -> Process:
        self.processes.append(Process(self.loop, name))
        return self.processes[-1]

    async def bus(self, owner: Process) -> Bus:
        bus: Bus = await owner.start(Bus.connect("nats://simulated", owner.name, owner.name), "connect")
        return bus

    async def echo(self, owner: Process, *, queue_group: str = "") -> list[bytes]:
        """Have `owner` answer "work"; returns what it is asked."""
        seen: list[bytes] = []
        bus = await self.bus(owner)

        async def handler(message: Msg) -> None:
            seen.append(bytes(message.data))
            await bus.reply(message, owner.name.encode())

        await owner.start(bus.serve("work", handler, queue_group=queue_group), "serve")
        await owner.start(bus.flush(), "flush")
        return seen


def run(story: Callable[[Net], Awaitable[None]]) -> None:
    net = Net()
    connection = type("Connection", (SimulatedConnection,), {"server": net.server})

    async def told() -> None:
        try:
            await story(net)
        finally:
            for process in net.processes:
                if not process.dead:
                    await process.kill()

    with mock.patch.object(bus_module, "Connection", connection), simulated_time(net.loop):
        try:
            net.loop.run_until_complete(told())
        finally:
            net.loop.close()


def test_the_clock_jumps_and_shows_everybody_the_same() -> None:
    async def story(net: Net) -> None:
        await asyncio.sleep(3600)
        assert time.monotonic() == time.perf_counter() == net.loop.time() == START + 3600

    before = time.monotonic()
    run(story)
    assert time.monotonic() - before < 60


def test_a_loop_that_waits_for_nothing_says_so() -> None:
    loop = SimulatedLoop()
    with pytest.raises(RuntimeError, match="deadlock"):
        loop.run_until_complete(loop.create_future())
    loop.close()


def test_who_asks_nobody_is_told_at_once() -> None:
    async def story(net: Net) -> None:
        asking = net.process("asking")
        bus = await net.bus(asking)
        start = net.loop.time()
        with pytest.raises(NoRespondersError):
            await asking.start(bus.request("nobody", b"", timeout=10), "ask")
        assert net.loop.time() - start < 0.1

    run(story)


def test_a_queue_group_shares_and_the_messages_of_one_connection_stay_in_order() -> None:
    async def story(net: Net) -> None:
        seen = [await net.echo(net.process(name), queue_group="all") for name in ("a", "b")]
        asking = net.process("asking")
        bus = await net.bus(asking)
        for number in range(40):
            await asking.start(bus.publish("work", bytes([number])), "publish")
        await asyncio.sleep(1)
        assert sorted(seen[0] + seen[1]) == [bytes([number]) for number in range(40)]
        assert seen[0] == sorted(seen[0])
        assert seen[0]
        assert seen[1]

    run(story)


def test_what_is_under_way_when_a_connection_breaks_is_lost_and_the_bus_comes_back() -> None:
    async def story(net: Net) -> None:
        seen = await net.echo(net.process("serving"))
        asking = net.process("asking")
        bus = await net.bus(asking)
        asked = asking.start(bus.request("work", b"lost", timeout=60), "ask")
        await asyncio.sleep(0)
        net.server.crash()
        with pytest.raises(MoeError) as caught:
            await asked
        assert caught.value.code == "bus_unavailable"
        assert not bus.connected
        with pytest.raises(MoeError):
            await asking.start(bus.request("work", b"refused", timeout=60), "ask")
        net.server.start()
        await asyncio.sleep(2)
        assert await asking.start(bus.request("work", b"kept", timeout=60), "ask") == b"serving"
        assert seen == [b"kept"]

    run(story)


def test_what_is_sent_into_a_short_cut_arrives_late_and_into_a_long_one_never() -> None:
    async def story(net: Net) -> None:
        serving, asking = net.process("serving"), net.process("asking")
        seen = await net.echo(serving)
        bus = await net.bus(asking)
        net.server.block("asking", 2, 6)
        await asking.start(bus.publish("work", b"late"), "publish")
        await asyncio.sleep(1.9)
        assert seen == []
        await asyncio.sleep(0.2)
        assert seen == [b"late"]
        net.server.block("asking", 20, 6)
        await asking.start(bus.publish("work", b"never"), "publish")
        connected = []
        for seconds in (5, 2, 30):
            await asyncio.sleep(seconds)
            connected.append(bus.connected)
        assert connected == [True, False, True]
        assert seen == [b"late"]

    run(story)


def test_a_stopped_process_does_nothing_and_goes_on_where_it_was() -> None:
    async def story(net: Net) -> None:
        serving, asking = net.process("serving"), net.process("asking")
        seen = await net.echo(serving)
        bus = await net.bus(asking)
        woken: list[float] = []

        async def sleeper() -> None:
            await asyncio.sleep(1)
            woken.append(net.loop.time())

        serving.start(sleeper(), "sleeper")
        await asyncio.sleep(0)
        serving.stop()
        start = net.loop.time()
        asked = asking.start(bus.request("work", b"hello", timeout=60), "ask")
        await asyncio.sleep(5)
        assert not seen
        assert not woken
        serving.resume()
        assert await asked == b"serving"
        assert woken == [start + 5]

    run(story)


def test_of_a_killed_process_no_task_is_left_and_nobody_hears_its_last_words() -> None:
    async def story(net: Net) -> None:
        serving, asking = net.process("serving"), net.process("asking")
        await net.echo(serving)
        bus = await net.bus(asking)
        heard: list[bytes] = []
        await asking.start(bus.watch("words", lambda message: heard.append(bytes(message.data))), "watch")
        other = await net.bus(serving)

        async def last_words() -> None:
            try:
                await asyncio.sleep(100)
            finally:
                await other.publish("words", b"farewell")

        serving.start(last_words(), "words")
        await asyncio.sleep(1)
        for session in [s for s in net.server.sessions if s.client.process is serving]:
            session.client.sever()
        await serving.kill()
        assert serving.tasks == []
        await asyncio.sleep(1)
        assert heard == []
        with pytest.raises(NoRespondersError):
            await asking.start(bus.request("work", b"", timeout=10), "ask")

    run(story)
