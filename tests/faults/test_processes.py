"""Processes die, stall, and are restarted under load, and no text differs from the undisturbed one."""

from __future__ import annotations

import asyncio
import base64
import signal
import time

import httpx
import numpy as np
import pytest

from services.chaos_load import StreamReader, ask
from shared.settings import ExpertSettings
from tests.faults.fleet import FaultFleet
from tests.running import wait_until

GRACE_SECONDS = ExpertSettings.model_fields["grace_seconds"].default
STALL_SECONDS = 5.0


@pytest.mark.parametrize(
    "name",
    [
        "expert-0",
        "router-0",
        "nats",
        pytest.param("expert-1", marks=pytest.mark.faults),
        pytest.param("router-1", marks=pytest.mark.faults),
        pytest.param("monitor", marks=pytest.mark.faults),
    ],
)
async def test_killed_and_started_again(fleet: FaultFleet, name: str) -> None:
    async def fault() -> None:
        await fleet.kill(name)
        await fleet.restart(name)

    await fleet.under_load(fault)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["expert-0", "router-0", "monitor", "nats"])
async def test_stopped_for_seconds_and_then_goes_on(fleet: FaultFleet, name: str) -> None:
    async def fault() -> None:
        fleet.signal(name, signal.SIGSTOP)
        try:
            await asyncio.sleep(STALL_SECONDS)  # the fault itself
        finally:
            fleet.signal(name, signal.SIGCONT)
        await fleet.all_ready()

    await fleet.under_load(fault)


@pytest.mark.faults
async def test_the_only_router_is_killed_and_streams_wait_for_it(fleet: FaultFleet) -> None:
    await fleet.running["router-1"].stop()

    async def fault() -> None:
        await fleet.kill("router-0")
        await fleet.start("router-0")
        await fleet.start("router-1")  # later than the other in all likelihood; the streams need only one
        await fleet.ready("router-0", "router-1")

    await fleet.under_load(fault)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["router-0", "router-1", "expert-0", "nats"])
async def test_forward_passes_and_routes_in_flight(fleet: FaultFleet, name: str) -> None:
    hidden = np.random.default_rng(3).standard_normal((4, 256), dtype="<f4").tobytes()
    over = False
    failures: list[str] = []
    asked = [0]

    async def forward(client: httpx.AsyncClient) -> bytes:
        headers = {"Content-Type": "application/octet-stream"}
        answer = await client.post("/v1/moe/forward?layer=1", content=hidden, headers=headers)
        if answer.status_code != 200:
            failures.append(answer.text)
        return answer.content

    async def route(client: httpx.AsyncClient) -> bytes:
        answer = await client.post("/v1/moe/route", json={"prompt": "def read_file(path):\n    return open(path)"})
        if answer.status_code != 200:
            failures.append(answer.text)
        return answer.content

    async def again(client: httpx.AsyncClient, expected: list[bytes]) -> None:
        while not over:
            came = await asyncio.gather(forward(client), route(client))
            asked[0] += 1
            if list(came) != expected and not failures:
                failures.append(f"other bytes: {[base64.b64encode(c[:80]) for c in came]}")

    async with fleet.http() as client:
        expected = [await forward(client), await route(client)]
        tasks = [asyncio.create_task(again(client, expected)) for _ in range(4)]
        try:
            await wait_until(lambda: asked[0] >= 8, "forward passes and routes to come back")
            await fleet.kill(name)
            await fleet.restart(name)
            seen = asked[0]
            await wait_until(lambda: asked[0] >= seen + 8, "them to come back afterwards")
        finally:
            over = True
            await asyncio.gather(*tasks)
    assert failures == []
    await fleet.at_rest()


@pytest.mark.faults
async def test_a_rolling_update_fails_nothing(fleet: FaultFleet) -> None:
    async def fault() -> None:
        for name in ("monitor", "expert-0", "expert-1", "router-0", "router-1"):
            fleet.signal(name, signal.SIGTERM)
            code = await fleet.running[name].ended(GRACE_SECONDS + 1)
            assert code == 0, fleet.running[name].said()
            await fleet.restart(name)

    await fleet.under_load(fault)


@pytest.mark.faults
async def test_a_gateway_finishes_its_streams_on_sigterm(fleet: FaultFleet) -> None:
    load = fleet.load
    readers = [StreamReader() for _ in load.questions]
    tasks = [
        asyncio.create_task(ask(load.client, question, number, 60, reader))
        for number, (question, reader) in enumerate(zip(load.questions, readers, strict=True))
    ]
    await wait_until(lambda: all(reader.times for reader in readers), "all streams to flow")
    fleet.signal("gateway", signal.SIGTERM)
    answers = await asyncio.gather(*tasks)
    assert await fleet.running["gateway"].ended(GRACE_SECONDS + 1) == 0, fleet.running["gateway"].said()
    assert [asked.failure for asked, _ in answers] == [""] * len(answers)
    assert [answer for _, answer in answers] == load.known
    await fleet.start("gateway")
    await fleet.all_ready()
    await fleet.at_rest()


@pytest.mark.faults
async def test_a_second_sigterm_ends_a_draining_router_at_once(fleet: FaultFleet) -> None:
    async def fault() -> None:
        fleet.signal("router-0", signal.SIGTERM)

        def draining() -> bool:
            status = fleet.status("router-0")
            return fleet.running["router-0"].process.returncode is not None or (
                status is not None and status.state == "draining"
            )

        await wait_until(draining, "it to drain")
        sent = time.monotonic()
        if fleet.running["router-0"].process.returncode is None:
            fleet.signal("router-0", signal.SIGTERM)
        assert await fleet.running["router-0"].ended(2) in {0, 1}
        assert time.monotonic() - sent < 2
        await fleet.restart("router-0")

    await fleet.under_load(fault)
