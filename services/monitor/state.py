"""What the monitor keeps: pure functions from what was kept, and a look at the fleet, to what is to be kept.

Each gives back the very value it got if there is nothing to write. What a change means for people goes with it as
audit records, in the value's own `unwritten`: one write keeps both, so neither can be lost without the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from services.monitor.messages import AuditRecord, Deployment, Member, OpenAlert, Placement, Roster
from shared.status import Status

LAST_SEEN_SECONDS = 60.0
REASONS = 8
"""Workers that a placement's reason names; of a fleet that starts, the rest is counted."""

Shards = tuple[tuple[int, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Look:
    """The fleet as `actor`, a monitor, sees it at the Unix time `now`."""

    live: Sequence[Status]
    now: float
    actor: str
    first: bool = False
    """Whether this monitor has not looked before: when something went, it does not know."""
    alerts: tuple[OpenAlert, ...] | None = None
    """What everybody was told of, by the monitor that acts; None: this is another one, or it does not know yet."""

    def record(self, action: str, subject: str, text: str) -> AuditRecord:
        identity = f"{self.now:.6f}-{self.actor}-{action}-{subject}"
        return AuditRecord(id=identity, time=self.now, actor=self.actor, action=action, subject=subject, text=text)

    def of(self, deployment: str) -> list[Status]:
        """Reports of routers and workers of `deployment`."""
        return [s for s in self.live if s.deployment == deployment and s.service in ("router", "expert")]


def deployments(look: Look) -> list[str]:
    """Deployments that a router or a worker reports."""
    return sorted({s.deployment for s in look.live if s.deployment and s.service in ("router", "expert")})


def deployment_after(before: Deployment | None, deployment: str, look: Look) -> Deployment | None:
    """What is known of `deployment`, with its last sighting renewed once a minute."""
    mine = look.of(deployment)
    if not mine:
        return before
    shown = Deployment(
        model=mine[0].model,
        fingerprint=deployment.rpartition("-")[2],
        num_shards=max(s.num_shards for s in mine),
        first_seen=before.first_seen if before else look.now,
        last_seen=before.last_seen if before else look.now,
    )
    if shown == before and abs(look.now - shown.last_seen) < LAST_SEEN_SECONDS:
        return before
    return msgspec.structs.replace(shown, last_seen=look.now)


def placement_after(before: Placement | None, deployment: str, look: Look, *, floor: int = 0) -> Placement | None:
    """Who serves which shard of `deployment`.

    Args:
        before: what was kept; None if nothing was, or nothing that could be read.
        deployment: whose shards.
        look: at the fleet.
        floor: the highest epoch that may have been told before: the new one is higher than it and than `before`'s.

    """
    serving: dict[int, set[str]] = {}
    for status in look.of(deployment):
        if status.service == "expert" and status.state == "ready":
            for shard in status.shards:
                serving.setdefault(shard, set()).add(status.instance)
    shards = tuple((shard, tuple(sorted(serving[shard]))) for shard in sorted(serving) if shard >= 0)
    lost = floor > (before.epoch if before else 0)
    if not lost and shards == (before.shards if before else ()):
        return before
    epoch = max(floor, before.epoch if before else 0) + 1
    reason = reason_of(before.shards if before else (), shards)
    if lost:
        reason = f"what was kept of epoch {floor} or before is lost; {reason}"
    record = look.record("placement_changed", deployment, f"epoch {epoch}: {reason}")
    return Placement(epoch=epoch, shards=shards, time=look.now, reason=reason, unwritten=(record,))


def reason_of(before: Shards, after: Shards) -> str:
    """How two placements differ, worker by worker: `expert-2 serves 1; expert-1 no longer serves 0, 1`."""

    def pairs(shards: Shards) -> set[tuple[str, int]]:
        return {(instance, shard) for shard, instances in shards for instance in instances}

    had, has = pairs(before), pairs(after)
    parts = []
    for verb, changed in (("serves", has - had), ("no longer serves", had - has)):
        for instance in sorted({name for name, _ in changed}):
            numbers = ", ".join(str(shard) for name, shard in sorted(changed) if name == instance)
            parts.append(f"{instance} {verb} {numbers}")
    more = [f"and {len(parts) - REASONS} more"] if len(parts) > REASONS else []
    return "; ".join([*parts[:REASONS], *more]) or "nothing else changed"


def roster_after(before: Roster | None, look: Look, *, damaged: bool = False) -> Roster:
    """Who is there and what is wrong, with a record of all that came, went, opened or closed.

    Args:
        before: what was kept; None if nothing was, or nothing that could be read.
        look: at the fleet.
        damaged: whether `before` is None because it could not be read: then nobody is said to have come.

    """
    old = before or Roster(members=(), alerts=())
    members = tuple(
        Member(service=s.service, instance=s.instance, draining=s.state == "draining")
        for s in sorted(look.live, key=lambda s: (s.service, s.instance))
    )
    alerts = old.alerts if look.alerts is None else look.alerts
    if before is not None and (members, alerts) == (before.members, before.alerts):
        return before
    if damaged:
        records = [look.record("state_rebuilt", "roster", "what was kept could not be read; begun anew")]
    else:
        records = [*_gone(old.members, members, look), *_new(old.members, members, look)]
    had, has = ({(a.kind, a.service, a.subject): a for a in some} for some in (old.alerts, alerts))
    records += [look.record("alert_opened", a.subject, f"{a.kind}: {a.text}") for k, a in has.items() if k not in had]
    records += [look.record("alert_closed", a.subject, f"{a.kind} is over") for k, a in had.items() if k not in has]
    return Roster(members=members, alerts=alerts, unwritten=tuple(records))


def _gone(before: Sequence[Member], now: Sequence[Member], look: Look) -> list[AuditRecord]:
    present = {(m.service, m.instance) for m in now}
    records = []
    for member in before:
        if (member.service, member.instance) in present:
            continue
        who = f"{member.service} {member.instance}"
        if member.draining:
            records.append(look.record("service_left", member.instance, f"{who} has drained and left"))
        elif look.first:
            records.append(look.record("service_down", member.instance, f"{who} went while no monitor watched"))
        else:
            records.append(look.record("service_down", member.instance, f"{who} has fallen silent"))
    return records


def _new(before: Sequence[Member], now: Sequence[Member], look: Look) -> list[AuditRecord]:
    known = {(m.service, m.instance) for m in before}
    return [
        look.record("service_appeared", m.instance, f"{m.service} {m.instance} has come")
        for m in now
        if (m.service, m.instance) not in known
    ]
