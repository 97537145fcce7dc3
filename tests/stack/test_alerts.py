"""All workers of a shard are killed: the alert fires, another worker takes the shard over, the alert is over."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from services.monitor.keeper import EVENTS_STREAM, ROSTER
from services.monitor.messages import AuditRecord, Event
from shared import wire
from shared.bus import Bus
from shared.jetstream import JetStream
from tests.faults.unsupervised import Processes, processes
from tests.monitor.keeping import SOON, Nats, nats_server, records
from tests.running import Watcher, start_service, wait_until, watching


@pytest_asyncio.fixture(loop_scope="session")
async def server(tmp_path: Path) -> AsyncIterator[Nats]:
    async with nats_server(tmp_path / "nats") as own:
        yield own


@pytest_asyncio.fixture(loop_scope="session")
async def own_watcher(server: Nats) -> AsyncIterator[Watcher]:
    async with watching(server.url) as client:
        yield client


async def events(bus: Bus) -> list[Event]:
    """What the stream keeps, in its order."""
    return [wire.decode(Event, data) for data in await JetStream(bus).stream(EVENTS_STREAM).last(1000)]


async def told(bus: Bus, subject: str) -> list[tuple[str, str]]:
    """(kind, state) of the events about `subject`."""
    return [(e.kind, e.state) for e in await events(bus) if e.subject == subject]


async def audited(bus: Bus, subject: str) -> list[str]:
    found: list[AuditRecord] = await records(bus)
    return [r.action for r in found if r.subject == subject]


async def at_rest(fleet: Processes, watcher: Watcher) -> None:
    """Wait until all serve and the monitor knows them."""
    await fleet.all_ready(watcher.fleet)

    async def known() -> bool:
        return {r.subject for r in await records(watcher.bus) if r.action == "service_appeared"} >= set(fleet.running)

    await wait_until(known, "the monitor to know everybody", SOON)

    async def nothing_fires() -> bool:  # if workers start slowly, the router needs their shards before they serve them
        counts = [len(await told(watcher.bus, f"{fleet.deployment}/{shard}")) for shard in (0, 1)]
        return all(count % 2 == 0 for count in counts)

    await wait_until(nothing_fires, "the end of alerts from the start", SOON)


async def test_the_last_worker_of_a_shard_dies(tmp_path: Path, server: Nats, own_watcher: Watcher) -> None:
    bus = own_watcher.bus
    async with processes(tmp_path, server.url, "alerts") as fleet:
        monitor = await start_service(tmp_path, "monitor", NATS_URL=server.url, METRICS_PORT="0", ENV="staging")
        try:
            await at_rest(fleet, own_watcher)
            victim, heir = fleet.only_holder(own_watcher.fleet, 1), fleet.only_holder(own_watcher.fleet, 0)
            shard = f"{fleet.deployment}/1"
            before = await told(bus, shard)
            await fleet.running[victim].kill()
            wanted = [
                ("shard_without_replica", "firing"),
                ("takeover", ""),
                ("shard_without_replica", "resolved"),
            ]

            async def all_told() -> bool:
                return len(await told(bus, shard)) >= len(before) + len(wanted)

            await wait_until(all_told, f"three events about {shard}; {monitor.said()}", SOON)
            assert (await told(bus, shard))[len(before) :] == wanted, monitor.said()
            assert await told(bus, victim) == [("service_down", "firing")]
            assert heir in next(e.text for e in await events(bus) if e.kind == "takeover")

            await fleet.start("expert", int(victim[-1]))

            async def back() -> bool:
                return await told(bus, victim) == [("service_down", "firing"), ("service_down", "resolved")]

            await wait_until(back, f"the end of the other alert; {monitor.said()}", SOON)

            async def kept() -> bool:
                return [a for a in await audited(bus, shard) if a.startswith("alert")][-2:] == [
                    "alert_opened",
                    "alert_closed",
                ]

            await wait_until(kept, f"the same in {ROSTER}'s records", SOON)
            await monitor.stop()
        finally:
            await monitor.kill()
