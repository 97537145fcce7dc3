"""What the monitor keeps, for the terminal."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec
from rich.table import Table

from services.monitor.keeper import AUDIT_STREAM, BUCKET, DEPLOYMENT, PLACEMENT
from services.monitor.messages import AuditRecord, Deployment, Placement
from shared import wire
from shared.bus import Bus, without_secrets
from shared.errors import BadMessageError, MoeError, StartError
from shared.jetstream import Bucket, JetStream

CONNECT_SECONDS = 3


@dataclass(frozen=True)
class Audit:
    """The state as it was read; values that cannot be read are only counted."""

    deployments: dict[str, Deployment]
    placements: dict[str, Placement]
    records: list[AuditRecord]
    damaged: int


async def read(nats_url: str, last: int) -> Audit:
    """The placements, the deployments, and the `last` audit records.

    Raises:
        StartError: no NATS server answers, or it has no JetStream, or nothing was ever kept there.

    """
    where = f"NATS_URL={without_secrets(nats_url)}"
    try:
        bus = await Bus.connect(nats_url, "audit", f"audit-{os.getpid()}", wait_seconds=CONNECT_SECONDS)
    except MoeError as error:
        raise StartError(f"{where}: {error.message}") from None
    try:
        jetstream = JetStream(bus)
        bucket = await jetstream.bucket(BUCKET)
        if bucket is None:
            raise StartError(f"{where}: no monitor has kept anything there yet")
        return await _read(bucket, await jetstream.stream(AUDIT_STREAM).last(last))
    except MoeError as error:
        raise StartError(f"{where}: {error.message}") from None
    finally:
        await bus.abort()


async def _read(bucket: Bucket, raw: list[bytes]) -> Audit:
    found = Audit({}, {}, [], damaged=0)
    damaged = 0
    for key in await bucket.keys():
        entry = await bucket.get(key)
        try:
            if entry is not None and key.startswith(DEPLOYMENT):
                found.deployments[key.removeprefix(DEPLOYMENT)] = wire.decode(Deployment, entry.value)
            elif entry is not None and key.startswith(PLACEMENT):
                found.placements[key.removeprefix(PLACEMENT)] = wire.decode(Placement, entry.value)
        except BadMessageError:
            damaged += 1
    records: dict[str, AuditRecord] = {}
    for data in raw:
        try:
            record = wire.decode(AuditRecord, data)
        except BadMessageError:
            damaged += 1
        else:
            records.setdefault(record.id, record)
    return Audit(found.deployments, found.placements, list(records.values()), damaged)


def when(seconds: float) -> str:
    """Unix seconds as UTC, to the second; as they are where no calendar has them."""
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}Z"
    except (ValueError, OverflowError, OSError):
        return f"{seconds:g}"


def tables(kept: Audit) -> list[Table]:
    """The placements that hold now, and the records, the oldest first."""
    placements = Table("deployment", "epoch", "since", "shard: workers", "reason", title="placements")
    for name, p in kept.placements.items():
        shards = "\n".join(f"{shard}: {', '.join(instances)}" for shard, instances in p.shards)
        placements.add_row(name, str(p.epoch), when(p.time), shards or "none", p.reason)
    title = "audit records" + (f" ({kept.damaged} values cannot be read)" if kept.damaged else "")
    records = Table("time", "action", "subject", "what and why", "by", title=title)
    for r in kept.records:
        records.add_row(when(r.time), r.action, r.subject, r.text, r.actor)
    return [placements, records]


def as_json(kept: Audit) -> str:
    """All of it, as one JSON object."""
    return msgspec.json.format(msgspec.json.encode(kept), indent=2).decode()
