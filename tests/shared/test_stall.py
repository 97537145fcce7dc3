"""A process that is stopped and goes on: what waited in its socket meanwhile is stale, what comes afterwards is not."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from shared.bus import BUDGET_MS, STALL_SECONDS, Bus
from shared.errors import MoeError
from tests.running import Running, start, wait_until

SECONDS = 20
SERVICE = """
import asyncio, sys
from shared.bus import Bus

async def main():
    bus = await Bus.connect(sys.argv[1], "stall", "stall-1")
    computed = []

    async def handler(message):
        computed.append(bytes(message.data).decode())
        await bus.reply(message, ",".join(computed).encode())

    await bus.serve("stall-work", handler, capacity=256)
    await bus.flush()
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest_asyncio.fixture(loop_scope="session")
async def service(tmp_path: Path, nats_url: str) -> AsyncIterator[Running]:
    running = await start(tmp_path, "stall", sys.executable, "-c", SERVICE, nats_url)
    try:
        yield running
    finally:
        await running.kill()


@pytest_asyncio.fixture(loop_scope="session")
async def bus(nats_url: str) -> AsyncIterator[Bus]:
    made = await Bus.connect(nats_url, "asking", f"asking-{os.getpid()}-stall")
    yield made
    await made.abort()


async def computed(bus: Bus, name: str, budget_ms: int) -> str:
    """What the service has computed by then, this among it; or the code of its error reply."""
    try:
        answer = await bus.request("stall-work", name.encode(), timeout=SECONDS, headers={BUDGET_MS: str(budget_ms)})
    except MoeError as error:
        return error.code
    return answer.decode()


async def test_what_grew_stale_in_the_socket_is_not_computed(service: Running, bus: Bus) -> None:
    async def serves() -> bool:
        return await computed(bus, "first", 5000) == "first"

    await wait_until(serves, f"it to serve; {service.said()}", SECONDS)
    process = psutil.Process(service.process.pid)
    process.send_signal(signal.SIGSTOP)
    await wait_until(lambda: process.status() == psutil.STATUS_STOPPED, "it to stop", SECONDS)
    sent = asyncio.get_running_loop().time()
    stale = [asyncio.create_task(computed(bus, f"stale-{n}", 500)) for n in range(50)]
    patient = asyncio.create_task(computed(bus, "patient", 60_000))
    await bus.flush()
    await wait_until(lambda: asyncio.get_running_loop().time() - sent > STALL_SECONDS + 0.5, "time to pass", SECONDS)
    process.send_signal(signal.SIGCONT)
    assert await asyncio.gather(*stale) == ["deadline_exceeded"] * 50
    assert await patient == "first,patient"
    assert await computed(bus, "fresh", 5000) == "first,patient,fresh"
    assert "bus.stalled" in service.said()


async def test_a_short_pause_takes_nothing_from_a_budget(service: Running, bus: Bus) -> None:
    async def serves() -> bool:
        return "first" in await computed(bus, "first", 5000)

    await wait_until(serves, f"it to serve; {service.said()}", SECONDS)
    for n in range(5):
        assert (await computed(bus, f"n{n}", 500)).endswith(f"n{n}")
    assert "bus.stalled" not in service.said()


@pytest.mark.parametrize("budget", ["nan", "inf", "1e999", "9" * 400, "x", " "])
async def test_a_budget_that_is_no_number_is_no_limit(service: Running, bus: Bus, budget: str) -> None:
    async def serves() -> bool:
        return "first" in await computed(bus, "first", 5000)

    await wait_until(serves, f"it to serve; {service.said()}", SECONDS)
    answer = await bus.request("stall-work", b"odd", timeout=SECONDS, headers={BUDGET_MS: budget})
    assert answer.endswith(b"odd")
