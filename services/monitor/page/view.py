"""What the page shows: the newest look at the fleet, the hour before it, and what was told; also without NATS."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace

import structlog
from nats.aio.msg import Msg

from services.monitor.keeper import AUDIT_STREAM, EVENTS_STREAM
from services.monitor.observations import Observation
from services.monitor.page.chronicle import MAX_ENTRIES, Chronicle, Entry
from services.monitor.report import REPORT_SECONDS, FleetReport, LayerReport, expert_layers, fleet_report
from services.monitor.sight import Sight, leader
from services.monitor.timeline import STEP_SECONDS, Point, Timeline, point
from shared import subjects
from shared.bus import Bus
from shared.errors import BadMessageError, MoeError
from shared.instrumentation import BAD_MESSAGES
from shared.jetstream import JetStream

log = structlog.get_logger()

TICK_SECONDS = 1.0
RELOAD_SECONDS = 10.0
EXPERTS_SECONDS = 600.0
"""The heat map's window: short ones are too noisy to read."""
DECISIONS = 50
ALERTS = 20
PRESENCE = 20


@dataclass(frozen=True)
class Snapshot:
    """All that the page shows, and all of /state.json. Times are Unix seconds."""

    time: float
    monitor: str
    """This one."""
    acting: str | None
    """The monitor that decides; None: unknown."""
    nats_url: str
    connected: bool
    since: float
    """Connected, or not, since then."""
    report: FleetReport | None
    """None: nobody was ever heard."""
    experts: dict[str, tuple[LayerReport, ...]]
    """By deployment, over `experts_seconds`."""
    experts_seconds: float
    points: tuple[Point, ...]
    firing: tuple[Entry, ...]
    alerts: tuple[Entry, ...]
    decisions: tuple[Entry, ...]
    presence: tuple[Entry, ...]


@dataclass(frozen=True)
class _Look:
    """What one moment showed."""

    seen: Observation
    """Of the last REPORT_SECONDS."""
    experts: dict[str, tuple[LayerReport, ...]]


class View:
    """Keeps what the page shows up to date; may be asked before there is a connection, and while there is none."""

    def __init__(self, sight: Sight, nats_url: str) -> None:
        """Know nothing yet.

        Args:
            sight: the reports.
            nats_url: without secrets; it is shown.

        """
        self._sight = sight
        self._nats_url = nats_url
        self._bus: Bus | None = None
        self._heard_from = 0.0
        self._connected = False
        self._since = time.time()
        self._last: _Look | None = None
        self._made: tuple[float, Snapshot] | None = None
        self.timeline = Timeline()
        self.chronicle = Chronicle()

    async def watch(self, bus: Bus) -> None:
        """Hear events from now on."""
        self._bus, self._heard_from = bus, time.monotonic()
        await bus.watch(subjects.EVENTS_ALL, self.on_event)

    async def run(self) -> None:
        """Keep the hour's points, and what the streams kept."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._tick(), name="page-ticks")
            group.create_task(self._read_streams(), name="page-streams")

    def on_event(self, message: Msg) -> None:
        self._note(message.subject, message.data)

    def _note(self, subject: str, data: bytes) -> None:
        try:
            self.chronicle.note(subject, data, time.time())
        except BadMessageError:
            BAD_MESSAGES.labels("event").inc()

    async def _tick(self) -> None:
        while True:
            try:
                self.tick(time.monotonic())
            except Exception:  # a page that cannot be made must not end the watching
                log.exception("page.failed")
            await asyncio.sleep(TICK_SECONDS)

    def tick(self, now: float) -> None:
        """Notice whether there is a connection, and add to the hour when a step has passed."""
        connected = self._bus is not None and self._bus.connected
        if connected != self._connected:
            if not connected:
                self._look()  # the last that was heard is still at hand
            self._connected, self._since = connected, time.time()
        if self._bus is None or now - self._heard_from < STEP_SECONDS or not self.timeline.due(now):
            return
        self.timeline.add(point(self._sight.look(self._bus, STEP_SECONDS)), now)

    def _look(self) -> None:
        if self._bus is None:
            return
        seen = self._sight.look(self._bus, REPORT_SECONDS)
        if not seen.instances and self._last is not None and not seen.connected:
            return
        long = self._sight.look(self._bus, EXPERTS_SECONDS)
        names = sorted({m.status.deployment for m in long.of("router")} - {""})
        experts = {name: expert_layers([m for m in long.of("router") if m.status.deployment == name]) for name in names}
        self._last = _Look(seen, experts)

    async def _read_streams(self) -> None:
        """Read what was told before we heard, once for each connection; events that come meanwhile count once."""
        read: int | None = None
        while True:
            bus = self._bus
            if bus is not None and bus.connected and bus.connection != read:
                connection = bus.connection
                try:
                    await self._read(bus)
                except MoeError as error:  # no JetStream: the page shows what it hears
                    log.debug("page.streams", reason=error.message)
                    await asyncio.sleep(RELOAD_SECONDS)
                    continue
                read = connection
            await asyncio.sleep(TICK_SECONDS)

    async def _read(self, bus: Bus) -> None:
        jetstream = JetStream(bus)
        for stream in (EVENTS_STREAM, AUDIT_STREAM):
            for subject, data in await jetstream.stream(stream).newest(MAX_ENTRIES):
                self._note(subject, data)

    def snapshot(self) -> Snapshot:
        """Now, or a moment ago: many readers cost no more than one."""
        now = time.monotonic()
        connected = self._bus is not None and self._bus.connected
        if self._made is None or now - self._made[0] >= TICK_SECONDS or self._made[1].connected != connected:
            self.tick(now)
            if connected:
                self._look()
            self._made = (now, self._snapshot())
        return self._made[1]

    def _snapshot(self) -> Snapshot:
        now, last = time.time(), self._last
        seen = replace(last.seen, connected=self._connected) if last else None
        return Snapshot(
            time=now,
            monitor=self._sight.instance,
            acting=leader(seen) if seen and self._connected else None,
            nats_url=self._nats_url,
            connected=self._connected,
            since=self._since,
            report=fleet_report(seen) if seen and seen.instances else None,
            experts=last.experts if last else {},
            experts_seconds=EXPERTS_SECONDS,
            points=tuple(self.timeline.points(now)),
            firing=tuple(self.chronicle.firing()),
            alerts=tuple(self.chronicle.alerts(ALERTS)),
            decisions=tuple(self.chronicle.decisions(DECISIONS)),
            presence=tuple(self.chronicle.presence(PRESENCE)),
        )
