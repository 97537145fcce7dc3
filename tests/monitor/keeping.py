"""A nats-server that a test may kill and start again on its folder, and a fleet of status reports."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from services.monitor.keeper import AUDIT_STREAM, BUCKET, PLACEMENT
from services.monitor.messages import AuditRecord, Placement
from services.nats_server import binary, free_port, write_config
from shared import subjects, wire
from shared.bus import Bus
from shared.jetstream import JetStream
from shared.status import Status
from tests.running import Running, answers, start, wait_until

SOON = 20.0
DEPLOYMENT = "demo-3f2a91bc"
REPORT_SECONDS = 0.1


@dataclass
class Nats:
    """One nats-server, always on the same port and folder."""

    folder: Path
    port: int
    process: Running | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def configure(self, *, jetstream: bool) -> None:
        self.folder.mkdir(exist_ok=True)
        config = write_config(self.folder, self.port)
        if not jetstream:
            config.write_text(config.read_text().partition("jetstream {")[0])

    async def start(self) -> None:
        self.process = await start(self.folder, "nats-server", binary(), "--config", str(self.folder / "nats.conf"))
        await wait_until(lambda: answers(self.port), "nats-server to listen", SOON)

    async def kill(self) -> None:
        if self.process is not None:
            await self.process.kill()


@contextlib.asynccontextmanager
async def nats_server(folder: Path, *, jetstream: bool = True) -> AsyncIterator[Nats]:
    """A server of this test alone."""
    server = Nats(folder, free_port())
    server.configure(jetstream=jetstream)
    try:
        await server.start()
        yield server
    finally:
        await server.kill()


@contextlib.asynccontextmanager
async def connected(url: str, instance: str = "test-1") -> AsyncIterator[Bus]:
    bus = await Bus.connect(url, "test", instance)
    try:
        yield bus
    finally:
        await bus.abort()


def router(instance: str = "router-1", *, state: str = "ready", num_shards: int = 2) -> Status:
    return _status("router", instance, state=state, num_shards=num_shards)


def worker(instance: str, *shards: int, state: str = "ready") -> Status:
    return _status("expert", instance, state=state, num_shards=2, shards=shards)


def _status(service: str, instance: str, **more: object) -> Status:
    return Status(service=service, instance=instance, deployment=DEPLOYMENT, model="demo", **more)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def reporting(bus: Bus, fleet: list[Status]) -> AsyncIterator[None]:
    """Publish the reports of `fleet`, which the test may change meanwhile, many times a second."""

    async def report() -> None:
        while True:
            for status in list(fleet):
                if bus.connected:
                    await bus.publish(subjects.status(status.service, status.instance), wire.encode(status))
            await asyncio.sleep(REPORT_SECONDS)

    task = asyncio.create_task(report(), name="reports")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def placement(bus: Bus) -> Placement | None:
    """The placement that is kept now."""
    bucket = await JetStream(bus).bucket(BUCKET)
    entry = await bucket.get(PLACEMENT + DEPLOYMENT) if bucket else None
    return wire.decode(Placement, entry.value) if entry else None


async def epoch(bus: Bus) -> int:
    kept = await placement(bus)
    return kept.epoch if kept else 0


async def records(bus: Bus) -> list[AuditRecord]:
    return [wire.decode(AuditRecord, data) for data in await JetStream(bus).stream(AUDIT_STREAM).last(10_000)]


async def said(bus: Bus) -> list[tuple[str, str]]:
    """(action, subject) of each record."""
    return [(r.action, r.subject) for r in await records(bus)]
