"""Monitors at work on a real nats-server: each alert is said once and ends once, whoever of them dies meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import msgspec
import pytest
import pytest_asyncio
from nats.aio.msg import Msg

from services.monitor.alerting import LATE_SECONDS, RETURN_SECONDS, Hearing
from services.monitor.keeper import EVENTS_STREAM
from services.monitor.messages import Event
from services.monitor.service import serve
from services.nats_server import free_port
from shared import subjects, wire
from shared.bus import Bus
from shared.jetstream import JetStream
from shared.status import Status
from tests.monitor.keeping import DEPLOYMENT, Nats, connected, nats_server, records, reporting, router, worker
from tests.monitor.observing import settings
from tests.monitor.receiving import Receiver, receiving
from tests.running import wait_until

SOON = 40.0
SHARD = f"{DEPLOYMENT}/1"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest_asyncio.fixture(loop_scope="session")
async def server(tmp_path: Path) -> AsyncIterator[Nats]:
    async with nats_server(tmp_path / "nats") as own:
        yield own


class Monitor:
    """One monitor, in a task of the test."""

    def __init__(self, url: str, instance: str, webhook: str | None = None, **changed: float) -> None:
        self.port = free_port()
        self._shutdown = asyncio.Event()
        chosen = settings(
            nats_url=url,
            instance=instance,
            metrics_port=self.port,
            stale_seconds=1.5,
            alert_webhook_url=webhook,
            **changed,
        )
        self._task = asyncio.create_task(serve(chosen, self._shutdown), name=instance)

    async def die(self) -> None:
        """Go without a word."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def stop(self) -> None:
        self._shutdown.set()
        await self._task

    async def metrics(self) -> str:
        async with httpx.AsyncClient(trust_env=False) as client:
            return (await client.get(f"http://127.0.0.1:{self.port}/metrics")).text


@contextlib.asynccontextmanager
async def monitoring(url: str, instance: str, webhook: str | None = None, **changed: float) -> AsyncIterator[Monitor]:
    monitor = Monitor(url, instance, webhook, **changed)
    try:
        yield monitor
    finally:
        await monitor.die()


async def said(bus: Bus) -> list[tuple[str, str, str]]:
    """(subject, kind, state) of each event that is kept."""
    found = [wire.decode(Event, data) for data in await JetStream(bus).stream(EVENTS_STREAM).last(1000)]
    return [(e.subject, e.kind, e.state) for e in found]


async def until_said(bus: Bus, *wanted: tuple[str, str, str]) -> None:
    async def there() -> bool:
        return set(wanted) <= set(await said(bus))

    await wait_until(there, f"{wanted}", SOON)


async def until_audited(bus: Bus, action: str, *whom: str) -> None:
    async def there() -> bool:
        return {r.subject for r in await records(bus) if r.action == action} >= set(whom)

    await wait_until(there, f"{action} of {whom}", SOON)


def newcomer(name: str, *shards: int) -> Status:
    return msgspec.structs.replace(worker(name, *shards), started=time.time())


LOST = [("b", "service_down", "firing"), (SHARD, "shard_without_replica", "firing")]
OVER = [("b", "service_down", "resolved"), (SHARD, "shard_without_replica", "resolved")]


async def test_the_next_monitor_neither_repeats_an_alert_nor_forgets_its_end(server: Nats) -> None:
    fleet = [router(), worker("a", 0), worker("b", 1)]
    async with (
        connected(server.url) as bus,
        reporting(bus, fleet),
        receiving(Receiver(free_port(), [500])) as receiver,
    ):
        async with monitoring(server.url, "monitor-1", receiver.url) as first:
            await until_audited(bus, "service_appeared", "a", "b", "monitor-1")
            fleet.pop()
            await until_said(bus, *LOST)
            await until_audited(bus, "alert_opened", "b", SHARD)
            await wait_until(lambda: len(receiver.bodies) == 3, "two notifications, one of them twice", SOON)
            shown = await first.metrics()
            assert 'moe_alerts{alert="service_down",severity="critical",state="firing"} 1.0' in shown
            assert 'moe_alerts{alert="high_latency",severity="warning",state="firing"} 0.0' in shown
            await first.die()
        fleet.append(newcomer("c", 1))
        async with monitoring(server.url, "monitor-2", receiver.url) as second:
            await until_said(bus, *OVER)
            await until_audited(bus, "alert_closed", "b", SHARD)
            await wait_until(lambda: len(receiver.bodies) == 5, "the end of both", SOON)
            await second.stop()
        assert sorted(await said(bus)) == sorted([*LOST, *OVER])
    assert receiver.statuses() == ["firing"] * 3 + ["resolved"] * 2
    assert {body["alerts"][0]["fingerprint"] for body in receiver.bodies[3:]} == {
        body["alerts"][0]["fingerprint"] for body in receiver.bodies[:3]
    }


async def test_of_two_monitors_one_tells_and_the_other_goes_on_when_it_dies(server: Nats) -> None:
    fleet = [router(), worker("a", 0), worker("b", 1)]
    async with (
        connected(server.url) as bus,
        reporting(bus, fleet),
        monitoring(server.url, "monitor-1") as first,
    ):
        await until_audited(bus, "service_appeared", "monitor-1")
        async with monitoring(server.url, "monitor-2") as second:
            await until_audited(bus, "service_appeared", "a", "b", "monitor-2")
            fleet.pop()
            await until_said(bus, *LOST)
            await until_audited(bus, "alert_opened", "b", SHARD)
            await first.die()
            gone = ("monitor-1", "service_down", "firing")
            await until_said(bus, gone)
            fleet.append(newcomer("c", 1))
            await until_said(bus, *OVER)
            await second.stop()
        assert sorted(await said(bus)) == sorted([*LOST, gone, *OVER])


async def test_nobody_is_down_because_nats_was(server: Nats) -> None:
    fleet = [router(), worker("a", 0), worker("b", 1)]
    async with monitoring(server.url, "monitor-1") as monitor, connected(server.url) as bus, reporting(bus, fleet):
        await until_audited(bus, "service_appeared", "a", "b", "monitor-1")
        await server.kill()
        await wait_until(lambda: not bus.connected, "the connection to break", SOON)
        await server.start()
        await wait_until(lambda: bus.connected, "the connection to be back", SOON)
        fleet.pop()
        await until_said(bus, *LOST)
        await monitor.stop()
        assert sorted(await said(bus)) == sorted(LOST)


async def test_without_jetstream_alerts_are_told_all_the_same(tmp_path: Path) -> None:
    heard: list[tuple[str, str, str]] = []

    def on_event(message: Msg) -> None:
        event = wire.decode(Event, message.data)
        heard.append((event.subject, event.kind, event.state))

    async with nats_server(tmp_path / "plain", jetstream=False) as server, connected(server.url) as bus:
        await bus.watch(subjects.event("alert"), on_event)
        fleet = [router(), worker("a", 0), worker("b", 1)]
        reports: list[str] = []
        await bus.watch(subjects.status("monitor", "monitor-1"), lambda message: reports.append(message.subject))
        async with reporting(bus, fleet), monitoring(server.url, "monitor-1") as monitor:
            await wait_until(lambda: len(reports) > 1, "the monitor to have heard the others for a second", SOON)
            fleet.pop()
            await wait_until(lambda: set(LOST) <= set(heard), "the alerts", SOON)
            fleet.append(newcomer("c", 1))
            await wait_until(lambda: set(OVER) <= set(heard), "their end", SOON)
            await monitor.stop()
    assert sorted(heard) == sorted([*LOST, *OVER])


# -- when silence says something -------------------------------------------------------------------------------------


def settled(hearing: Hearing, start: float = 0.0, connection: int = 1) -> float:
    """Look each second until it hears; the time of the last look."""
    now = start
    while not hearing.judge(now, connection, own_report_fresh=True):
        now += 1.0
        assert now < start + 100
    return now


def test_silence_says_nothing_until_the_connection_has_stood_for_a_while() -> None:
    assert settled(Hearing(1.0)) == RETURN_SECONDS
    assert settled(Hearing(20.0)) == 20.0


@pytest.mark.parametrize("connection", [None, 2])
def test_a_break_of_the_connection_begins_it_anew(connection: int | None) -> None:
    hearing = Hearing(1.0)
    now = settled(hearing)
    assert not hearing.judge(now + 1, connection, own_report_fresh=True)
    assert settled(hearing, now + 2, 2) >= now + 1 + RETURN_SECONDS


def test_who_does_not_hear_itself_hears_nobody() -> None:
    hearing = Hearing(1.0)
    now = settled(hearing)
    assert not hearing.judge(now + 1, 1, own_report_fresh=False)
    assert settled(hearing, now + 2) >= now + 1 + RETURN_SECONDS


def test_a_look_that_comes_late_finds_reports_unread() -> None:
    hearing = Hearing(1.0)
    now = settled(hearing)
    assert hearing.judge(now + LATE_SECONDS, 1, own_report_fresh=True)
    assert not hearing.judge(now + 2 * LATE_SECONDS + 0.1, 1, own_report_fresh=True)


async def test_what_scaling_has_given_up_is_an_alert_like_any_other(server: Nats) -> None:
    busy = {"cpu": 0.95, "cores": 1.0}
    fleet = [router(), *(msgspec.structs.replace(worker(name, 0, 1), model="demo", **busy) for name in "ab")]
    async with (
        connected(server.url) as bus,
        reporting(bus, fleet),
        monitoring(
            server.url, "monitor-1", alert_pending_seconds=0, scaling_cooldown_seconds=0, scaling_attempts=1
        ) as monitor,
    ):
        await until_said(bus, ("expert", "scaling_ineffective", "firing"))
        shown = await monitor.metrics()
        assert 'moe_alerts{alert="scaling_ineffective",severity="warning",state="firing"} 1.0' in shown
        fleet[1:] = [msgspec.structs.replace(each, cpu=0.1) for each in fleet[1:]]
        await until_said(bus, ("expert", "scaling_ineffective", "resolved"))
