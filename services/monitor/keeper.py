"""Keeps the monitor's state in JetStream: compare-and-set writes, and audit records that count once acknowledged.

Several monitors may keep it at once: each change is one write on the revision that it was made from, so it has one
author, and whoever comes second reads again and finds nothing left to say. Without JetStream nothing else changes: it
is said once, and tried again each second.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import msgspec
import structlog

from services.monitor.messages import Deployment, OpenAlert, Placement, Roster
from services.monitor.state import Look, deployment_after, deployments, placement_after, roster_after
from shared import subjects, wire
from shared.bus import Bus
from shared.errors import BadMessageError, MoeError
from shared.instrumentation import EVENTS, STATE_STORED
from shared.jetstream import Bucket, ConflictError, JetStream, Stream
from shared.status import Fleet, Status

log = structlog.get_logger()

BUCKET = "moe-state"
EVENTS_STREAM = "MOE_EVENTS"
AUDIT_STREAM = "MOE_AUDIT"
ROSTER = "roster"
DEPLOYMENT = "deployments."
PLACEMENT = "placement."
HISTORY = 5
DAY_SECONDS = 86_400.0
EVENT_DAYS = 7
AUDIT_DAYS = 90
STATE_BYTES = 16 * 2**20
EVENT_BYTES = 32 * 2**20
AUDIT_BYTES = 64 * 2**20
ATTEMPTS = 3
LOOK_SECONDS = 1.0
LEAVE_SECONDS = 2.0

M = TypeVar("M", Deployment, Placement, Roster)

EVENTS.labels("audit")  # from the start, so that a dashboard shows zero and not nothing


@dataclass
class Kept(Generic[M]):
    """A key's value as it was last read or written; None: there is none, or none that can be read."""

    value: M | None
    revision: int
    damaged: bool = False


@dataclass
class Store:
    """The bucket and the stream, and what is known of the bucket's keys."""

    bucket: Bucket
    audit: Stream
    rosters: dict[str, Kept[Roster]] = field(default_factory=dict)
    deployments: dict[str, Kept[Deployment]] = field(default_factory=dict)
    placements: dict[str, Kept[Placement]] = field(default_factory=dict)


class Keeper:
    """One monitor's hand in the state."""

    def __init__(self, bus: Bus, fleet: Fleet, settle_seconds: float) -> None:
        """Keep nothing until the connection has stood for `settle_seconds`: who is silent is known only then."""
        self._bus = bus
        self._fleet = fleet
        self._settle_seconds = settle_seconds
        self._connection: int | None = None
        self._listening_since = 0.0
        self._store: Store | None = None
        self._epochs: dict[str, int] = {}
        self._looked = False
        self._said: str | None = None
        self.stored = False
        self.told: Callable[[], tuple[OpenAlert, ...] | None] = lambda: None
        """What everybody was told of by this monitor; None: it is not the one that acts."""

    @property
    def failing(self) -> bool:
        """Whether nothing can be kept for now."""
        return self._said is not None

    async def open_alerts(self) -> tuple[OpenAlert, ...] | None:
        """What is kept of what everybody was told of; None: that cannot be read now."""
        if self._store is None:
            return None
        try:
            kept = await self._read(self._store, Roster, ROSTER)
        except MoeError:
            return None
        return kept.value.alerts if kept.value else ()

    async def run(self) -> None:
        while True:
            try:
                await self._keep()
            except Exception:  # a bug of ours must not end the watching
                log.exception("state.failed")
                self._store = None
            await asyncio.sleep(LOOK_SECONDS)

    async def leave(self) -> None:
        """Note that this monitor goes, so that the next one does not miss it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_SECONDS):
                await self._keep(leaving=True)

    async def _keep(self, *, leaving: bool = False) -> None:
        if not self._bus.connected:
            self._fail("the connection to NATS is down")
            return
        now = time.monotonic()
        if self._connection != self._bus.connection:  # nobody was heard meanwhile, and NATS may have another disk
            self._connection, self._listening_since, self._store = self._bus.connection, now, None
        try:
            if self._store is None:
                self._store = await self._open()
            if now - self._listening_since >= self._settle_seconds:
                await self._write(self._store, self._live(leaving=leaving))
        except MoeError as error:
            self._fail(error.message)
            return
        if not self.stored:
            kept = self._store.placements.items()
            epochs = {key.removeprefix(PLACEMENT): k.value.epoch for key, k in kept if k.value}
            log.info("state.stored", epochs=epochs)
        self.stored, self._said = True, None
        STATE_STORED.set(1)

    def _live(self, *, leaving: bool) -> list[Status]:
        live = self._fleet.live()
        if leaving:
            live = [
                msgspec.structs.replace(s, state="draining") if s.instance == self._bus.instance else s for s in live
            ]
        return live

    def _fail(self, reason: str) -> None:
        """Go on without; tell why, once for each reason."""
        self.stored, self._store = False, None
        STATE_STORED.set(0)
        if reason != self._said:
            log.warning("state.not_stored", reason=reason, text="nothing is kept for now; requests are served as ever")
        self._said = reason

    async def _open(self) -> Store:
        """Make what is missing, and learn which placements were kept."""
        jetstream = JetStream(self._bus)
        bucket = await jetstream.make_bucket(BUCKET, history=HISTORY, max_bytes=STATE_BYTES)
        audit = await jetstream.make_stream(
            AUDIT_STREAM, [subjects.AUDIT], max_age_seconds=AUDIT_DAYS * DAY_SECONDS, max_bytes=AUDIT_BYTES, sync=True
        )
        await jetstream.make_stream(
            EVENTS_STREAM,
            [subjects.event(kind) for kind in subjects.EVENT_KINDS],
            max_age_seconds=EVENT_DAYS * DAY_SECONDS,
            max_bytes=EVENT_BYTES,
            sync=False,
        )
        store = Store(bucket, audit)
        for key in await bucket.keys():
            if key.startswith(PLACEMENT):
                store.placements[key] = await self._read(store, Placement, key)
        return store

    async def _write(self, store: Store, live: Sequence[Status]) -> None:
        """Bring what is kept up to what is seen."""
        look = Look(live, time.time(), self._bus.instance, first=not self._looked, alerts=self.told())
        await self._bring(
            store, store.rosters, Roster, ROSTER, lambda k: roster_after(k.value, look, damaged=k.damaged)
        )
        self._looked = True
        known = {key.removeprefix(PLACEMENT) for key in store.placements}
        for name in sorted({*deployments(look), *known}):
            try:
                subjects.token(name)
            except ValueError:  # somebody reports what is no deployment
                continue
            await self._write_deployment(store, name, look)

    async def _write_deployment(self, store: Store, name: str, look: Look) -> None:
        key = PLACEMENT + name

        def placement(kept: Kept[Placement]) -> Placement | None:
            # Each epoch took a write, and each write raised the bucket's revision: no epoch was higher than that.
            told = kept.value.epoch if kept.value else kept.revision
            self._epochs[name] = max(self._epochs.get(name, 0), told)
            return placement_after(kept.value, name, look, floor=self._epochs[name])

        await self._bring(
            store, store.deployments, Deployment, DEPLOYMENT + name, lambda k: deployment_after(k.value, name, look)
        )
        await self._bring(store, store.placements, Placement, key, placement)

    async def _bring(
        self, store: Store, cache: dict[str, Kept[M]], kind: type[M], key: str, step: Callable[[Kept[M]], M | None]
    ) -> None:
        """Make the value of `key` what `step` makes of it, starting over when somebody else was faster."""
        for _ in range(ATTEMPTS):
            kept = cache.get(key) or await self._read(store, kind, key)
            try:
                kept = cache[key] = await self._tell(store, key, kept)
                wanted = step(kept)
                if wanted is None or wanted is kept.value:
                    return
                revision = await store.bucket.put(key, wire.encode(wanted), last=kept.revision)
                kept = cache[key] = Kept(wanted, revision)
                cache[key] = await self._tell(store, key, kept)
            except ConflictError:
                log.debug("state.conflict", key=key)
                cache.pop(key, None)
            else:
                return

    async def _read(self, store: Store, kind: type[M], key: str) -> Kept[M]:
        entry = await store.bucket.get(key)
        if entry is None:
            return Kept(None, 0)
        try:
            return Kept(wire.decode(kind, entry.value), entry.revision)
        except BadMessageError as error:
            log.warning("state.damaged", key=key, revision=entry.revision, reason=error.message)
            return Kept(None, entry.revision, damaged=True)

    async def _tell(self, store: Store, key: str, kept: Kept[M]) -> Kept[M]:
        """Put the records of `kept` into the audit stream, and note that they are there."""
        value = kept.value
        if value is None or isinstance(value, Deployment) or not value.unwritten:
            return kept
        for record in value.unwritten:
            await store.audit.append(subjects.AUDIT, wire.encode(record), record_id=record.id)
            EVENTS.labels("audit").inc()
            log.info("audit", action=record.action, subject=record.subject, text=record.text)
        told = msgspec.structs.replace(value, unwritten=())
        return Kept(told, await store.bucket.put(key, wire.encode(told), last=kept.revision))
