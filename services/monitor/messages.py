"""What the monitor tells everybody, and what it keeps. docs/protocol.md specifies it."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from shared.status import MAX_LAYERS, MAX_SHARDS
from shared.wire import Message

PARTS = 256
"""Into so many parts a plan splits an expert's tokens."""
MAX_SPLIT_EXPERTS = 65_536

Epoch = Annotated[int, msgspec.Meta(ge=1)]
Shard = Annotated[int, msgspec.Meta(ge=0)]
HostShard = Annotated[int, msgspec.Meta(ge=0, lt=MAX_SHARDS)]


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


class SplitExpert(msgspec.Struct, frozen=True, kw_only=True):
    """An expert whose tokens are not all for its own shard, e mod S."""

    layer: Annotated[int, msgspec.Meta(ge=0, lt=MAX_LAYERS)]
    """Its number among the MoE layers, from 0."""
    expert: Annotated[int, msgspec.Meta(ge=0, lt=MAX_SPLIT_EXPERTS)]
    shards: Annotated[
        tuple[tuple[HostShard, Annotated[int, msgspec.Meta(ge=1, le=PARTS)]], ...],
        msgspec.Meta(min_length=1, max_length=PARTS),
    ]
    """(shard, how many of PARTS parts of its tokens), ascending; the parts add up to PARTS."""

    def __post_init__(self) -> None:
        """Check what the fields' types do not say.

        Raises:
            ValueError: shards that do not ascend, or parts that do not add up.

        """
        shards = [shard for shard, _ in self.shards]
        if shards != sorted(set(shards)):
            raise ValueError("shards must ascend")
        if sum(parts for _, parts in self.shards) != PARTS:
            raise ValueError(f"parts must add up to {PARTS}")


class ExpertPlan(Message, frozen=True, kw_only=True):
    """`moe.<d>.plan`, and `plan.<d>` in the bucket moe-state: which experts have copies, and who gets their tokens.

    A shard always holds its own experts, e mod S, whatever a plan says: so nobody depends on having heard of it.
    """

    epoch: Epoch
    """Grows with each plan, and never goes back."""
    num_shards: Annotated[int, msgspec.Meta(ge=1, le=MAX_SHARDS)]
    """S, for which it is made; with another S it means nothing."""
    experts: Annotated[tuple[SplitExpert, ...], msgspec.Meta(max_length=MAX_SPLIT_EXPERTS)] = ()
    """Those that are split; all others are for their own shards alone."""
    time: float
    """Unix seconds."""
    before: float
    """The imbalance (most loaded shard over the mean) of the load that it was made for, without it."""
    expected: float
    """And with it."""
    reason: str

    def fits(self, num_layers: int, num_experts: int, num_shards: int) -> bool:
        """Whether it is for a model of L MoE layers and E experts, in S shards."""
        return self.num_shards == num_shards and all(
            e.layer < num_layers and e.expert < num_experts and e.shards[-1][0] < num_shards for e in self.experts
        )

    def replaces(self, other: ExpertPlan | None) -> bool:
        """Whether it is the newer one. Of one epoch there can be two, by monitors that did not hear each other."""
        return other is None or (self.epoch, self.time) > (other.epoch, other.time)


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
