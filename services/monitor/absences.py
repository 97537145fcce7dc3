"""Who is gone, and what nobody serves for it: pure functions of an observation and of what asking has proved.

Silence is proof only where we hear others; the caller sees to that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from services.monitor.findings import shards_missing
from services.monitor.observations import FRESH_SECONDS, Measured, Observation
from services.monitor.rules import Key, Reading, Verdict
from shared.settings import MonitorSettings

Lost = Mapping[tuple[str, str], str]
"""(service, instance) -> `gone`, nobody listens there any more, or `stalled`, it does not answer."""


def absences(
    seen: Observation, lost: Lost, settings: MonitorSettings, opened: Mapping[Key, tuple[str, float]]
) -> list[Reading]:
    """Readings of service_down and shard_without_replica.

    Args:
        seen: the fleet.
        lost: what asking has proved.
        settings: STALE_SECONDS and ALERT_FORGET_SECONDS.
        opened: (deployment, when it fired in Unix seconds) of each service_down that fires: who is silent for long is
            in no observation any more.

    """
    return [*service_down(seen, lost, settings, opened), *shard_without_replica(seen, lost, settings)]


class _Down(NamedTuple):
    since: float
    """Unix seconds of its last report."""
    service: str
    instance: str
    deployment: str
    how: str


def _key(m: Measured) -> tuple[str, str]:
    return m.service, m.instance


def _is_down(m: Measured, lost: Lost, settings: MonitorSettings) -> bool:
    return _key(m) in lost or m.age > settings.stale_seconds


def service_down(
    seen: Observation, lost: Lost, settings: MonitorSettings, opened: Mapping[Key, tuple[str, float]]
) -> Iterable[Reading]:
    """Instances that fell silent and did not say that they go, until they are back or another is in their place."""
    rule = "service_down"
    down: list[_Down] = []
    for m in seen.instances:
        s = m.status
        if not _is_down(m, lost, settings):
            heard = m.age <= FRESH_SECONDS
            verdict: Verdict = "good" if heard else "unknown"
            text = f"{s.service} {s.instance} {'is heard' if heard else 'is late with its report'}"
            yield Reading(rule, s.instance, verdict, text, None, None, s.deployment, s.service, s.instance)
        elif s.state == "draining":
            text = f"{s.service} {s.instance} has drained and left"
            yield Reading(rule, s.instance, "good", text, None, None, s.deployment, s.service, s.instance)
        else:
            how = lost.get(_key(m), "")
            word = {"gone": "is gone: nobody listens there any more", "stalled": "has stalled: it answers nothing"}
            how = word.get(how, "has fallen silent")
            down.append(_Down(seen.now - m.age, s.service, s.instance, s.deployment, how))
    known = {_key(m) for m in seen.instances}
    for (kind, service, instance), (deployment, fired) in opened.items():
        if kind == rule and (service, instance) not in known:
            down.append(_Down(fired, service, instance, deployment, "has fallen silent"))
    yield from _replaced(seen, sorted(down), lost, settings)


def _replaced(
    seen: Observation,
    down: Collection[_Down],
    lost: Lost,
    settings: MonitorSettings,
) -> Iterable[Reading]:
    """Each that is down; of those that came since, the first stands in the place of the first that was lost."""
    fresh = [m for m in seen.instances if m.status.state == "ready" and not _is_down(m, lost, settings)]
    spare = sorted(fresh, key=lambda m: m.status.started)
    verdict: Verdict
    for since, service, instance, deployment, how in down:
        heirs = [m for m in spare if (m.service, m.status.deployment) == (service, deployment)]
        heir = next((m for m in heirs if m.status.started > since), None)
        if heir is not None:
            spare.remove(heir)
            text = f"{service} {instance} is gone, and {heir.instance} is in its place"
            verdict = "good"
        elif seen.now - since > settings.alert_forget_seconds:
            text = f"{service} {instance} has not come back for {seen.now - since:.0f} s and is taken as removed"
            verdict = "good"
        else:
            verdict, text = "bad", f"{service} {instance} {how}"
        yield Reading("service_down", instance, verdict, text, None, None, deployment, service, instance)


def shard_without_replica(seen: Observation, lost: Lost, settings: MonitorSettings) -> Iterable[Reading]:
    """Ready workers of each shard, where a router asks for it."""
    rule = "shard_without_replica"
    here = [m for m in seen.instances if not _is_down(m, lost, settings)]
    missing = shards_missing([m.status for m in here])
    silent = {
        m.status.deployment
        for m in seen.instances
        if m.service == "router" and _is_down(m, lost, settings) and m.status.state != "draining"
    }
    for deployment in sorted({m.status.deployment for m in seen.instances if m.status.deployment}):
        mine = [m.status for m in here if m.status.deployment == deployment]
        served = Counter(shard for s in mine if s.service == "expert" and s.state == "ready" for shard in s.shards)
        sizes = [m.status.num_shards for m in seen.instances if m.status.deployment == deployment]
        verdict: Verdict
        for shard in range(max(sizes)):
            subject, replicas = f"{deployment}/{shard}", float(served[shard])
            if replicas:
                verdict, text = "good", f"shard {shard} of {deployment} is served"
            elif shard in missing.get(deployment, ()):
                verdict, text = "bad", f"no worker serves shard {shard} of {deployment}"
            elif deployment in silent:
                verdict, text = "unknown", f"no router of {deployment} is heard of"
            else:
                verdict, text = "good", f"no router needs shard {shard} of {deployment} now"
            yield Reading(rule, subject, verdict, text, replicas, 1.0, deployment, "expert")
