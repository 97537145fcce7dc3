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
    """An alert's rule, or what happened: `takeover`."""
    subject: str
    """The instance, host, deployment or shard that it is about."""
    text: str
    time: float
    """Unix seconds."""
    state: Literal["", "firing", "resolved"] = ""
    """Of an alert; empty: this is none."""
    severity: Literal["", "critical", "warning", "info"] = ""
    action: str = ""
    """What it calls for: `scale_up`, `investigate`, `optimize_cache`, `restart`, `takeover`, `rebalance`."""
    value: float | None = None
    threshold: float | None = None
    started: float = 0.0
    """Unix seconds of the firing."""
    fingerprint: str = ""
    """The same in everything that is said of one alert."""


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
    `state_rebuilt`."""
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
    """An alert that everybody was told of, as it was then, and that is not known to be over."""

    kind: str
    subject: str
    text: str = ""
    service: str = ""
    deployment: str = ""
    instance: str = ""
    severity: Literal["", "critical", "warning", "info"] = ""
    action: str = ""
    advice: str = ""
    """What to do, for people."""
    value: float | None = None
    threshold: float | None = None
    started: float = 0.0
    """Unix seconds of the firing."""
    notified: float = 0.0
    """Unix seconds of its group's last notification."""


class Roster(Message, frozen=True, kw_only=True):
    """`roster` in the bucket moe-state: who is there, and what is wrong."""

    members: tuple[Member, ...]
    alerts: tuple[OpenAlert, ...]
    unwritten: tuple[AuditRecord, ...] = ()
    """Records of the last change that may not be in the stream yet."""
