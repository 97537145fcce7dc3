"""A service is cut off from NATS, or finds it silent or slow, under load; no text differs from the undisturbed one."""

from __future__ import annotations

import asyncio

import pytest

from tests.faults.fleet import PROXIED, FaultFleet

FAULT_SECONDS = 5.0
SLOW_SECONDS, SLOW_EXPERT_SECONDS = 0.05, 0.3


@pytest.mark.faults
@pytest.mark.parametrize("name", PROXIED)
async def test_cut_off_for_five_seconds(fleet: FaultFleet, name: str) -> None:
    async def fault() -> None:
        await fleet.proxies[name].cut()
        await asyncio.sleep(FAULT_SECONDS)  # the fault itself
        await fleet.proxies[name].listen()
        await fleet.all_ready()

    await fleet.under_load(fault)


@pytest.mark.faults
@pytest.mark.parametrize("name", PROXIED)
async def test_bytes_held_back_for_five_seconds(fleet: FaultFleet, name: str) -> None:
    async def fault() -> None:
        fleet.proxies[name].hold()
        await asyncio.sleep(FAULT_SECONDS)  # the fault itself
        fleet.proxies[name].release()
        await fleet.all_ready()

    await fleet.under_load(fault)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "delay"),
    [
        ("gateway", SLOW_SECONDS),
        ("router-0", SLOW_SECONDS),
        ("expert-0", SLOW_SECONDS),
        ("expert-0", SLOW_EXPERT_SECONDS),
    ],
)
async def test_slow_for_five_seconds(fleet: FaultFleet, name: str, delay: float) -> None:
    async def fault() -> None:
        fleet.proxies[name].delay = delay
        await asyncio.sleep(FAULT_SECONDS)  # the fault itself
        fleet.proxies[name].delay = 0.0
        await fleet.all_ready()

    await fleet.under_load(fault)
