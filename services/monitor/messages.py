"""What the monitor tells everybody, and what it keeps. docs/protocol.md specifies it."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from shared.wire import Message

Epoch = Annotated[int, msgspec.Meta(ge=1)]
Shard = Annotated[int, msgspec.Meta(ge=0)]


class Event(Message, frozen=True, kw_only=True):
    """`moe.events.<kind>`: something that an operator should know."""

    kind: str
    """What is wrong: `service_down`, `shard_without_replica`."""
    subject: str
    """The instance or shard that it is about."""
    text: str
    time: float
    """Unix seconds."""


class AuditRecord(Message, frozen=True, kw_only=True):
    """`moe.events.audit`: who did what, and why. The stream MOE_AUDIT keeps it."""

    id: str
    """The same for a record that was sent twice, as its acknowledgement was lost."""
    time: float
    """Unix seconds."""
    actor: str
    """The monitor that says so."""
    action: str
    """`service_appeared`, `service_left`, `service_down`, `alert_opened`, `alert_closed`, `placement_changed`,
    `state_rebuilt`, `scaled`."""
    subject: str
    """The instance, shard, deployment or key that it is about."""
    text: str


class Deployment(Message, frozen=True, kw_only=True):
    """`deployments.<d>` in the bucket moe-state: what was served, and when."""

    model: str
    fingerprint: str
    """First 8 hex digits of the checkpoint's."""
    num_shards: Annotated[int, msgspec.Meta(ge=0)]
    first_seen: float
    """Unix seconds."""
    last_seen: float
    """Unix seconds, to the minute or so."""


class Placement(Message, frozen=True, kw_only=True):
    """`placement.<d>` in the bucket moe-state: which workers serve which shard."""

    epoch: Epoch
    """Grows with each change, and never goes back."""
    shards: tuple[tuple[Shard, tuple[str, ...]], ...]
    """(shard, instances), both ascending; a shard that nobody serves is not there."""
    time: float
    """Unix seconds."""
    reason: str
    unwritten: tuple[AuditRecord, ...] = ()
    """Records of this change that may not be in the stream yet."""


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """A service instance that was seen and not missed yet."""

    service: str
    instance: str
    draining: bool = False


class OpenAlert(msgspec.Struct, frozen=True, kw_only=True):
    """An alert that was opened and not closed yet."""

    kind: str
    subject: str


class Roster(Message, frozen=True, kw_only=True):
    """`roster` in the bucket moe-state: who is there, and what is wrong."""

    members: tuple[Member, ...]
    alerts: tuple[OpenAlert, ...]
    unwritten: tuple[AuditRecord, ...] = ()
    """Records of the last change that may not be in the stream yet."""


class MetricReading(msgspec.Struct, frozen=True, kw_only=True):
    """One of the figures that a scaling decision is made from."""

    metric: str
    """`cpu_usage`, `memory_usage`, `response_time`, `queue_depth`."""
    usage: float | None = None
    """Share of its target; None: unknown."""
    wanted: int | None = None
    """The count that it asks for; None: it asks for nothing."""
    text: str


class ScalingEvent(Message, frozen=True, kw_only=True):
    """`moe.events.scaling`: a decision about how many there should be. An Event, and all that it was made from."""

    kind: Literal["scale_up", "scale_down", "scaling_held"]
    subject: str
    """The service: `expert`, `router`."""
    text: str
    time: float
    """Unix seconds."""
    actor: str
    """The monitor that decided."""
    current: Annotated[int, msgspec.Meta(ge=0)]
    wanted: Annotated[int, msgspec.Meta(ge=0)]
    """By the metrics alone."""
    desired: Annotated[int, msgspec.Meta(ge=0)]
    """After all rules."""
    winner: str = ""
    """The metric that asked for the most."""
    metrics: tuple[MetricReading, ...] = ()
    held: tuple[tuple[str, str], ...] = ()
    """(rule, why) of each rule that kept a count from being asked for."""
    by_hand: bool = False
    dry_run: bool = False
    """Nothing was done about it."""
    outcome: str = ""
    """What the executor said."""


class ScaleRequest(Message, frozen=True, kw_only=True):
    """`moe.control.monitor.<instance>` (by hand), `moe.control.supervisor.<instance>`: have so many of each service."""

    op: Literal["scale"] = "scale"
    counts: Annotated[
        dict[Literal["expert", "router"], Annotated[int, msgspec.Meta(ge=0, le=1024)]], msgspec.Meta(max_length=2)
    ]
    """By service; none: change nothing and tell the counts."""
    reason: Annotated[str, msgspec.Meta(max_length=1024)] = ""


class ScaleReply(Message, frozen=True, kw_only=True):
    counts: dict[str, int]
    """That there are now, or will be when those that start are ready and those that drain are gone."""
    text: str
    """What was done, a sentence for people."""
