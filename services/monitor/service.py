"""The monitor as a service: looks at the fleet each second, tells what is wrong. Never on a request's path."""

from __future__ import annotations

import asyncio
import time

import msgspec
import structlog

from services.monitor.findings import Finding, findings, shards_missing
from services.monitor.keeper import Keeper
from services.monitor.messages import Event
from services.monitor.scaler import Scaler
from services.monitor.sight import Sight
from shared import subjects, wire
from shared.bus import Bus
from shared.errors import MoeError
from shared.instrumentation import EVENTS, INSTANCES, SHARD_REPLICAS, SHARDS_MISSING
from shared.service import base_status, instance_name, serve_metrics, service_context, until
from shared.settings import MonitorSettings
from shared.status import Fleet, State, Status, StatusReporter

log = structlog.get_logger()

EVENTS.labels("alert")  # from the start, so that a dashboard shows zero and not nothing


class Monitor:
    """Remembers the last look, and what was already said."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._before: list[Status] = []
        self._open: set[tuple[str, str]] = set()

    async def run(self, bus: Bus) -> None:
        while True:
            await self._look(bus)
            await asyncio.sleep(1)

    async def _look(self, bus: Bus) -> None:
        if not bus.connected:  # we hear nobody; that says nothing about them
            self._before = []
            return
        now = self._fleet.live()
        found = findings(self._before, now)
        self._before = now
        self._gauges(now)
        current = {(f.kind, f.subject) for f in found}
        for finding in found:
            if (finding.kind, finding.subject) not in self._open:
                await self._tell(bus, finding)
        self._open = current

    def _gauges(self, now: list[Status]) -> None:
        INSTANCES.clear()
        SHARD_REPLICAS.clear()
        SHARDS_MISSING.clear()
        for deployment, missing in shards_missing(now).items():
            SHARDS_MISSING.labels(deployment).set(len(missing))
        for status in now:
            INSTANCES.labels(status.service, status.state).inc()
            if status.service == "expert" and status.state == "ready":
                for shard in status.shards:
                    SHARD_REPLICAS.labels(status.deployment, str(shard)).inc()

    async def _tell(self, bus: Bus, finding: Finding) -> None:
        log.warning("alert", kind=finding.kind, subject=finding.subject, text=finding.text)
        EVENTS.labels("alert").inc()
        event = Event(kind=finding.kind, subject=finding.subject, text=finding.text, time=time.time())
        try:
            await bus.publish(subjects.event("alert"), wire.encode(event))
        except MoeError as error:
            log.warning("alert.unpublished", reason=error.message)


async def _watch(monitor: Monitor, keeper: Keeper, scaler: Scaler, bus: Bus) -> None:
    """Tell what is wrong, keep what was seen, and scale; nobody waits for the other."""
    async with asyncio.TaskGroup() as group:
        group.create_task(monitor.run(bus), name="alerts")
        group.create_task(keeper.run(), name="state")
        group.create_task(scaler.run(), name="scaling")


async def serve(settings: MonitorSettings, shutdown: asyncio.Event) -> None:
    """Run the monitor until `shutdown`.

    Raises:
        StartError: a taken port, no NATS.

    """
    instance = instance_name(settings, "monitor")
    bus: Bus | None = None
    address, stop_metrics = serve_metrics(settings, lambda: bus is not None and bus.connected)
    base = base_status(settings, "monitor", instance, address)
    reporter: StatusReporter | None = None
    keeper: Keeper | None = None
    state: State = "ready"

    def status() -> Status:
        stored = keeper is not None and keeper.stored
        known = reporter.with_usage(base) if reporter else base
        return msgspec.structs.replace(known, state=state, state_stored=stored, cores=1.0)

    try:
        async with service_context(settings, "monitor", instance, status) as service:
            reporter, bus = service.reporter, service.bus
            sight = Sight(instance)
            fleet = Fleet(settings.stale_seconds, tell=sight.tell)
            keeper = Keeper(service.bus, fleet, settings.stale_seconds)
            await fleet.watch(service.bus)
            scaler = Scaler(settings, service.bus, sight)
            await until(shutdown, _watch(Monitor(fleet), keeper, scaler, service.bus))
            state = "draining"
            await reporter.publish()
            await keeper.leave()
    finally:
        stop_metrics()
