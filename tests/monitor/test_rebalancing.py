"""A monitor's hand in the plans, on a real nats-server: who makes one, who hears it, and what outlives the monitor."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
import pytest_asyncio
from nats.aio.msg import Msg

from services.monitor import rebalancing
from services.monitor.keeper import AUDIT_STREAM, BUCKET
from services.monitor.messages import Event, ExpertPlan
from services.monitor.rebalancing import PLAN, Rebalancer
from services.monitor.sight import Sight
from shared import subjects, wire
from shared.bus import Bus
from shared.jetstream import JetStream
from shared.settings import MonitorSettings
from shared.status import Fleet, Status
from tests.monitor.keeping import DEPLOYMENT, SOON, Nats, connected, nats_server, records, reporting
from tests.running import wait_until

SHARDS = 4
SKEWED = (1000, 100, 100, 100, 100, 100, 100, 100)
EVEN = (200,) * 8


def router(tokens: tuple[int, ...] = (0,) * 8, **more: Any) -> Status:
    return Status(
        **{
            "service": "router",
            "instance": "router-1",
            "deployment": DEPLOYMENT,
            "state": "ready",
            "num_shards": SHARDS,
            "expert_tokens": (tokens,),
            "shard_tokens": (tuple(sum(tokens[shard::SHARDS]) for shard in range(SHARDS)),),
            **more,
        }
    )


def monitor(instance: str, started: float) -> Status:
    return Status(service="monitor", instance=instance, state="ready", started=started)


@dataclass
class Heard:
    """What is told on the bus."""

    plans: list[ExpertPlan] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    async def listen(self, bus: Bus) -> None:
        await bus.watch(subjects.plan(DEPLOYMENT), self.on_plan)
        await bus.watch(subjects.event("rebalance"), self.on_event)

    def on_plan(self, message: Msg) -> None:
        self.plans.append(wire.decode(ExpertPlan, message.data))

    def on_event(self, message: Msg) -> None:
        self.events.append(wire.decode(Event, message.data))


@contextlib.asynccontextmanager
async def rebalancing_monitor(url: str, instance: str, **settings: Any) -> AsyncIterator[Rebalancer]:
    """A monitor's sight and rebalancer, and nothing else of it."""
    given: dict[str, Any] = {"rebalance_min_tokens": 1000, "rebalance_half_life_seconds": 1000, **settings}
    async with connected(url, instance) as bus:
        sight = Sight(instance)
        await Fleet(tell=sight.tell).watch(bus)
        made = Rebalancer(bus, sight, MonitorSettings(**given))
        task = asyncio.create_task(made.run(), name=f"rebalance:{instance}")
        try:
            yield made
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@pytest_asyncio.fixture(loop_scope="session")
async def server(tmp_path: Path) -> AsyncIterator[Nats]:
    async with nats_server(tmp_path / "nats") as own, connected(own.url, "maker") as bus:
        jetstream = JetStream(bus)  # as the keeper of a monitor does
        await jetstream.make_bucket(BUCKET, history=5, max_bytes=2**20)
        await jetstream.make_stream(AUDIT_STREAM, [subjects.AUDIT], max_age_seconds=0, max_bytes=2**20, sync=False)
        yield own


@pytest.fixture(autouse=True)
def _quickly() -> Any:
    with (
        mock.patch.object(rebalancing, "MEASURE_SECONDS", 0.5),
        mock.patch.object(rebalancing, "LOOK_SECONDS", 0.1),
        mock.patch.object(rebalancing, "TELL_SECONDS", 0.3),
        mock.patch.object(rebalancing, "RECALL_SECONDS", 1.0),
    ):
        yield


def looked(made: Rebalancer) -> bool:
    """Whether it has seen the router: what was counted before is not of now."""
    balance = made._balances.get(DEPLOYMENT)
    return balance is not None and balance.load.tokens.shape == (1, 8)


async def kept(bus: Bus) -> ExpertPlan | None:
    bucket = await JetStream(bus).bucket(BUCKET)
    entry = await bucket.get(PLAN + DEPLOYMENT) if bucket else None
    return wire.decode(ExpertPlan, entry.value) if entry else None


async def test_a_skewed_load_gets_a_plan_that_is_told_kept_recorded_and_measured(server: Nats) -> None:
    fleet, heard = [router(), monitor("monitor-1", 1.0)], Heard()
    async with connected(server.url) as bus, reporting(bus, fleet), rebalancing_monitor(server.url, "monitor-1") as m:
        await heard.listen(bus)
        await wait_until(lambda: looked(m), "the monitor to see the router", SOON)
        fleet[0] = router(SKEWED)
        await wait_until(lambda: len(heard.plans) > 2, "a plan to be told again and again", SOON)
        assert all(plan == heard.plans[0] for plan in heard.plans)
        plan = heard.plans[0]
        assert (plan.epoch, plan.num_shards) == (1, SHARDS)
        assert plan.before == pytest.approx(1100 * 4 / 1700)
        assert plan.expected < 1.03
        assert await kept(bus) == plan
        fleet[0] = router(tuple(2 * n for n in SKEWED), epoch=1)

        def measured_while_the_router_goes_on_evenly() -> bool:
            sent = (tuple(n + 100 for n in fleet[0].shard_tokens[0]),)
            fleet[0] = msgspec.structs.replace(fleet[0], shard_tokens=sent)
            return [e.kind for e in heard.events] == ["rebalance_planned", "rebalance_measured"]

        await wait_until(measured_while_the_router_goes_on_evenly, "the monitor to say what came of it", SOON)
        assert "1." in heard.events[1].text
        assert {e.subject for e in heard.events} == {DEPLOYMENT}
        assert [r.action for r in await records(bus)] == ["rebalance_planned", "rebalance_measured"]
        assert len({plan.epoch for plan in heard.plans}) == 1


async def test_an_even_load_gets_none(server: Nats) -> None:
    fleet, heard = [router(), monitor("monitor-1", 1.0)], Heard()
    async with connected(server.url) as bus, reporting(bus, fleet), rebalancing_monitor(server.url, "monitor-1") as m:
        await heard.listen(bus)
        await wait_until(lambda: looked(m), "the monitor to see the router", SOON)
        fleet[0] = router(EVEN)
        await wait_until(lambda: m._balances[DEPLOYMENT].load.tokens.sum() > 1500, "it to count the tokens", SOON)
        at = m._balances[DEPLOYMENT].load._at or 0.0
        await wait_until(lambda: (m._balances[DEPLOYMENT].load._at or 0.0) > at + 0.3, "three more looks", SOON)
        assert not heard.plans


async def test_of_two_monitors_one_makes_the_plan_and_the_other_knows_it_and_goes_on_with_it(server: Nats) -> None:
    fleet = [router(), monitor("monitor-1", 1.0), monitor("monitor-2", 2.0)]
    heard = Heard()
    async with contextlib.AsyncExitStack() as opened:
        bus = await opened.enter_async_context(connected(server.url))
        await opened.enter_async_context(reporting(bus, fleet))
        second = await opened.enter_async_context(rebalancing_monitor(server.url, "monitor-2"))
        async with rebalancing_monitor(server.url, "monitor-1") as first:
            await heard.listen(bus)
            await wait_until(lambda: looked(first) and looked(second), "both to see the router", SOON)
            fleet[0] = router(SKEWED)
            await wait_until(lambda: second._balances[DEPLOYMENT].plan, "the second to hear of a plan", SOON)
            assert first._balances[DEPLOYMENT].plan == second._balances[DEPLOYMENT].plan
            assert second._balances[DEPLOYMENT].leading_since is None
        fleet[1] = msgspec.structs.replace(fleet[1], state="draining")
        told = len(heard.plans)
        await wait_until(lambda: len(heard.plans) > told + 2, "the second to go on telling it", SOON)
        assert len({(plan.epoch, plan.time) for plan in heard.plans}) == 1
        assert [event.kind for event in heard.events] == ["rebalance_planned"]


async def test_a_monitor_that_comes_after_all_were_away_goes_on_with_what_was_kept(server: Nats) -> None:
    fleet, heard = [router(), monitor("monitor-1", 1.0)], Heard()
    async with connected(server.url) as bus, reporting(bus, fleet):
        async with rebalancing_monitor(server.url, "monitor-1") as m:
            await wait_until(lambda: looked(m), "the monitor to see the router", SOON)
            fleet[0] = router(SKEWED)
            await wait_until(lambda: kept(bus), "the plan to be kept", SOON)
        was = await kept(bus)
        fleet[0] = router(SKEWED, epoch=1)
        await heard.listen(bus)
        async with rebalancing_monitor(server.url, "monitor-1"):
            await wait_until(lambda: heard.plans, "the plan to be told again", SOON)
        assert heard.plans[0] == was


async def test_a_plan_that_is_lost_is_made_anew_above_what_is_in_use(server: Nats) -> None:
    fleet, heard = [router(epoch=7), monitor("monitor-1", 1.0)], Heard()
    async with connected(server.url) as bus, reporting(bus, fleet), rebalancing_monitor(server.url, "monitor-1") as m:
        await heard.listen(bus)
        await wait_until(lambda: looked(m), "the monitor to see the router", SOON)
        fleet[0] = router(SKEWED, epoch=7)
        await wait_until(lambda: heard.plans, "a plan", SOON)
        assert heard.plans[0].epoch == 8


async def test_without_jetstream_a_plan_is_told_all_the_same(tmp_path: Path) -> None:
    fleet, heard = [router(), monitor("monitor-1", 1.0)], Heard()
    async with (
        nats_server(tmp_path / "nats", jetstream=False) as server,
        connected(server.url) as bus,
        reporting(bus, fleet),
        rebalancing_monitor(server.url, "monitor-1") as m,
    ):
        await heard.listen(bus)
        await wait_until(lambda: looked(m), "the monitor to see the router", SOON)
        fleet[0] = router(SKEWED)
        await wait_until(lambda: len(heard.plans) > 1, "a plan", SOON)
        assert heard.plans[0].epoch == 1


async def test_what_is_no_plan_is_ignored_and_the_setting_turns_it_off(server: Nats) -> None:
    fleet, heard = [router(), monitor("monitor-1", 1.0)], Heard()
    async with (
        connected(server.url) as bus,
        reporting(bus, fleet),
        rebalancing_monitor(server.url, "monitor-1") as m,
        rebalancing_monitor(server.url, "off", rebalance="off") as off,
    ):
        await wait_until(lambda: looked(m), "the monitor to see the router", SOON)
        for data in (b"", b"\xc1", wire.encode(fleet[1])):
            await bus.publish(subjects.plan(DEPLOYMENT), data)
        await heard.listen(bus)
        fleet[0] = router(SKEWED)
        await wait_until(lambda: heard.plans, "a plan all the same", SOON)
        assert not off._balances
