"""The fleet at a glance, for the terminal."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from services.monitor.keeper import BUCKET, ROSTER
from services.monitor.messages import OpenAlert, Roster
from services.monitor.observations import History
from services.monitor.report import FleetReport, InstanceReport, fleet_report
from shared import wire
from shared.bus import Bus, without_secrets
from shared.errors import BadMessageError, MoeError, StartError
from shared.jetstream import JetStream
from shared.status import STATUS_INTERVAL_SECONDS, Fleet

CONNECT_SECONDS = 3
WINDOW_SECONDS = 60.0
ALERTS_SECONDS = 5.0
"""Between two looks at what the monitor keeps, while watching."""
MAX_ROWS = 200
STATES = {"ready": "green", "draining": "yellow", "loading": "cyan", "starting": "cyan"}


@dataclass(frozen=True)
class Glance:
    """What is shown; `alerts` is None where no monitor keeps any."""

    report: FleetReport
    alerts: tuple[OpenAlert, ...] | None


class Watch:
    """Everybody's reports since the watching began, and the alerts that the monitor keeps."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._history = History(WINDOW_SECONDS)
        self._alerts: tuple[OpenAlert, ...] | None = None
        self._read = 0.0

    async def begin(self) -> None:
        """Hear reports for a little more than two rounds of them: rates need two of each instance."""
        fleet = Fleet(tell=self._history.observe)
        await fleet.watch(self._bus)
        await asyncio.sleep(STATUS_INTERVAL_SECONDS * 2.2)

    async def glance(self) -> Glance:
        """The fleet now."""
        now = time.monotonic()
        if self._bus.connected and (not self._read or now - self._read >= ALERTS_SECONDS):
            self._alerts, self._read = await _open_alerts(self._bus), now
        seen = self._history.observation(now, time.time(), connected=self._bus.connected)
        return Glance(fleet_report(seen), self._alerts)


async def _open_alerts(bus: Bus) -> tuple[OpenAlert, ...] | None:
    try:
        bucket = await JetStream(bus).bucket(BUCKET)
        entry = await bucket.get(ROSTER) if bucket else None
        return wire.decode(Roster, entry.value).alerts if entry else None
    except (MoeError, BadMessageError):  # no JetStream, or nothing that can be read: unknown, not none
        return None


@contextlib.asynccontextmanager
async def watching(nats_url: str) -> AsyncIterator[Watch]:
    """Listen to the fleet.

    Raises:
        StartError: no NATS server answers.

    """
    try:
        bus = await Bus.connect(nats_url, "status", f"status-{os.getpid()}", wait_seconds=CONNECT_SECONDS)
    except MoeError as error:
        raise StartError(f"NATS_URL={without_secrets(nats_url)}: {error.message}") from None
    try:
        watch = Watch(bus)
        await watch.begin()
        yield watch
    finally:
        await bus.abort()


async def once(nats_url: str) -> Glance:
    """The fleet now. Raises as `watching` does."""
    async with watching(nats_url) as watch:
        return await watch.glance()


async def live(nats_url: str, console: Console) -> None:
    """Show the fleet, each second anew, until the task is cancelled. Raises as `watching` does."""
    async with watching(nats_url) as watch:
        with Live(layout(await watch.glance()), console=console, auto_refresh=False) as display:
            while True:
                await asyncio.sleep(STATUS_INTERVAL_SECONDS)
                display.update(layout(await watch.glance()), refresh=True)


def as_json(glance: Glance) -> str:
    """All of it, as one JSON object."""
    return msgspec.json.format(msgspec.json.encode(glance), indent=2).decode()


def plain(text: str, style: str = "") -> Text:
    """`text` as it is, with no markup and nothing that a terminal would obey."""
    return Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text), style=style)


def layout(glance: Glance) -> RenderableType:
    """What the terminal shows."""
    report = glance.report
    if not report.instances:
        nobody = "nobody reports: start services with `openmoe up`, or check NATS_URL"
        return Text(nobody if report.connected else "NATS does not answer, and nobody has been heard", style="yellow")
    parts: list[RenderableType] = [_headline(report), _instances(report)]
    if any(d.shards for d in report.deployments):
        parts.append(_shards(report))
    parts.append(_alerts(glance))
    parts += [plain(f"advice: {text}") for text in report.recommendations]
    return Group(*parts)


def _headline(report: FleetReport) -> Text:
    gateway = report.latency.get("gateway", {})
    first, between = gateway.get("time_to_first_token"), gateway.get("inter_token")
    parts = [
        "" if report.connected else "NATS does not answer; this is the last that was heard.",
        f"{_number(report.throughput.output_tokens_per_second)} tokens/s",
        f"{_number(report.throughput.requests_per_second)} requests/s",
        f"first token p95 {_number(first.p95_ms if first else None)} ms",
        f"per token p95 {_number(between.p95_ms if between else None)} ms",
        f"failed {_share(report.errors.rate)}",
        f"cache hits {_share(report.cache.hit_rate)}",
    ]
    return Text("  ".join(part for part in parts if part))


def _instances(report: FleetReport) -> Table:
    table = Table("service", "instance", "state", "heard", "shards")
    for name in ("running", "waiting", "requests/s", "tokens/s", "cpu", "memory"):
        table.add_column(name, justify="right")
    for i in report.instances[:MAX_ROWS]:
        busy = i.fresh and i.service != "monitor"
        table.add_row(
            plain(i.service),
            plain(i.instance),
            _state(i),
            "now" if i.age_seconds < 2.5 else f"{i.age_seconds:.0f} s ago",
            ",".join(str(shard) for shard in i.shards),
            str(i.running) if busy else "–",
            str(i.waiting) if busy else "–",
            _number(i.requests_per_second) if busy else "–",
            _number(i.tokens_per_second) if busy else "–",
            "–" if i.cpu is None else f"{i.cpu:.2f}",
            "–" if i.memory_bytes is None else f"{i.memory_bytes / 2**20:.0f} MB",
        )
    if len(report.instances) > MAX_ROWS:
        table.caption = f"and {len(report.instances) - MAX_ROWS} more; --json has all"
    return table


def _state(i: InstanceReport) -> Text:
    if not i.fresh:
        return Text(f"silent (was {i.state})", style="red" if i.state != "draining" else "yellow")
    loaded = f" {i.loaded:.0%}" if i.loaded is not None else ""
    kept = ", without state" if i.state_stored is False else ""
    return Text(f"{i.state}{loaded}{kept}", style=STATES.get(i.state, ""))


def _shards(report: FleetReport) -> Table:
    table = Table("deployment", "shard", "replicas", "served by", "loading")
    rows = [(d, shard) for d in report.deployments for shard in d.shards]
    for d, shard in rows[:MAX_ROWS]:
        missing = Text("nobody", style="red") if shard.needed else Text("none")
        table.add_row(
            plain(d.deployment),
            str(shard.shard),
            str(len(shard.ready)) if shard.ready else missing,
            plain(", ".join(shard.ready)),
            plain(", ".join(shard.loading)),
        )
    if len(rows) > MAX_ROWS:
        table.caption = f"and {len(rows) - MAX_ROWS} more; --json has all"
    return table


def _alerts(glance: Glance) -> Text:
    if glance.alerts is None:
        return Text("alerts: unknown, as no monitor keeps any")
    if not glance.alerts:
        return Text("alerts: none")
    return Text("\n").join(plain(f"alert: {a.kind}: {a.subject}", style="red") for a in glance.alerts)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
