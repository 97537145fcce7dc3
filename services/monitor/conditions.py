"""What the figures of the last seconds say of each rule: pure functions of an observation.

Who does not report, or not for long enough, makes a figure unknown; nobody's silence counts as zero. That nothing was
asked is no silence: where all report, and report no request, nobody waits and nothing fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from services.monitor.observations import Measured, Observation, shard_tokens
from services.monitor.rules import Reading, judge
from shared.errors import HTTP_STATUS
from shared.histogram import added, quantile
from shared.settings import MonitorSettings

SERVICES = ("expert", "router", "gateway")
"""Along a request's way, the last one first: where a failure shows deepest is nearest to its cause."""
NAMES = 4
"""Instances that a text names at most."""
WEIGHTS_DOMINATE = 0.5
"""Share of the memory in use above which another instance would mostly load the same weights again."""


def figures(seen: Observation, settings: MonitorSettings) -> list[Reading]:
    """Readings of all rules about figures."""
    rules: tuple[Callable[[Observation, MonitorSettings], Iterable[Reading]], ...] = (
        high_latency,
        high_error_rate,
        low_cache_hit_rate,
        resource_exhaustion,
        expert_imbalance,
        queue_saturated,
    )
    return [reading for rule in rules for reading in rule(seen, settings)]


def by_deployment(instances: Iterable[Measured]) -> dict[str, list[Measured]]:
    result: dict[str, list[Measured]] = {}
    for m in instances:
        if m.status.deployment:
            result.setdefault(m.status.deployment, []).append(m)
    return result


def _measured(instances: Sequence[Measured]) -> list[Measured]:
    """Those whose report is fresh, and not their first."""
    return [m for m in instances if m.fresh and m.seconds > 0]


def _complete(instances: Sequence[Measured]) -> bool:
    """Whether everybody's figures are known, but of those that go."""
    return all((m.fresh and m.seconds > 0) or m.status.state == "draining" for m in instances)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


# -- latency ---------------------------------------------------------------------------------------------------------


def high_latency(seen: Observation, settings: MonitorSettings) -> Iterable[Reading]:
    """p95 of ALERT_LATENCY at the gateways, per deployment."""
    name, fires = settings.alert_latency, settings.alert_latency_ms / 1000
    what = f"p95 of {name.replace('_', ' ')}"
    for deployment, gateways in by_deployment(seen.of("gateway", fresh=False)).items():
        counts = added(m.latencies.get(name, ()) for m in _measured(gateways))
        samples, value = sum(counts), quantile(counts, 0.95)
        if samples >= settings.alert_min_samples and value is not None:
            verdict = judge(value, fires, settings.alert_latency_clear_ms / 1000)
            text = f"{what} of {deployment} is {1000 * value:.0f} ms over {samples} samples in {seen.window:g} s"
        elif samples == 0 and _complete(gateways) and not any(m.status.running or m.status.waiting for m in gateways):
            verdict, text = "good", f"nothing was asked of {deployment} in {seen.window:g} s"
        else:
            verdict, text = "unknown", f"{what} of {deployment} is unknown: {samples} samples in {seen.window:g} s"
        yield Reading("high_latency", deployment, verdict, text, value, fires, deployment)


# -- failures --------------------------------------------------------------------------------------------------------


def our_failures(m: Measured) -> dict[str, int]:
    """Failures by code that are ours and not the client's: HTTP 500 and above. Refusals (429) are answers."""
    return {code: count for code, count in m.failures.items() if HTTP_STATUS.get(code, 500) >= 500}


def high_error_rate(seen: Observation, settings: MonitorSettings) -> Iterable[Reading]:
    """Failures over requests where clients ask: at the gateways, or at the routers where there are none."""
    doors = by_deployment(seen.of("router", fresh=False)) | by_deployment(seen.of("gateway", fresh=False))
    for deployment, door in doors.items():
        failed = sum(sum(our_failures(m).values()) for m in _measured(door))
        asked = sum(m.requests for m in _measured(door)) + failed
        value = failed / asked if asked else None
        fires, worst = settings.alert_error_rate, None
        if asked >= settings.alert_min_samples and value is not None:
            verdict = judge(value, fires, settings.alert_error_rate_clear)
            worst = worst_of(seen, deployment, failed) if failed else None
            text = f"{_percent(value)} of {asked} requests to {deployment} failed in {seen.window:g} s"
            if worst:
                m, code, count = worst
                text += f"; most of it is {code} at {m.service} {m.instance} ({count} times)"
        elif asked == 0 and _complete(door):
            verdict, text = "good", f"nothing was asked of {deployment} in {seen.window:g} s"
        else:
            verdict, text = "unknown", f"the error rate of {deployment} is unknown: {asked} requests"
        instance = worst[0].instance if worst else ""
        yield Reading("high_error_rate", deployment, verdict, text, value, fires, deployment, instance=instance)


def worst_of(seen: Observation, deployment: str, failed: int) -> tuple[Measured, str, int] | None:
    """(instance, code, failures) that most of `failed` failures come from.

    Of the services that count at least half as many failures themselves it is the one farthest along a request's way.
    """
    for service in SERVICES:
        mine = [m for m in _measured(seen.of(service)) if m.status.deployment == deployment]
        counts = [(count, m.instance, code, m) for m in mine for code, count in our_failures(m).items()]
        if counts and 2 * sum(count for count, *_ in counts) >= failed:
            count, _, code, m = max(counts, key=lambda each: each[:3])
            return m, code, count
    return None


# -- cache -----------------------------------------------------------------------------------------------------------


def low_cache_hit_rate(seen: Observation, settings: MonitorSettings) -> Iterable[Reading]:
    """Hits over look-ups at the gateways, where a cache is in use."""
    fires = settings.alert_cache_hit_rate
    for deployment, gateways in by_deployment(seen.of("gateway", fresh=False)).items():
        if not any(m.status.cache_lookups for m in gateways):
            continue
        lookups = sum(m.cache_lookups for m in _measured(gateways))
        value = sum(m.cache_hits for m in _measured(gateways)) / lookups if lookups else None
        if lookups >= settings.alert_min_samples and value is not None:
            verdict = judge(value, fires, settings.alert_cache_hit_rate_clear, low=True)
            text = f"{_percent(value)} of {lookups} look-ups of {deployment} found an answer in {seen.window:g} s"
        elif lookups == 0 and _complete(gateways):
            verdict, text = "good", f"nothing was looked up for {deployment} in {seen.window:g} s"
        else:
            verdict, text = "unknown", f"the hit rate of {deployment} is unknown: {lookups} look-ups"
        yield Reading("low_cache_hit_rate", deployment, verdict, text, value, fires, deployment, "gateway")


# -- memory ----------------------------------------------------------------------------------------------------------


def resource_exhaustion(seen: Observation, settings: MonitorSettings) -> Iterable[Reading]:
    """Memory in use where instances run: a container of its own, or a host that they share."""
    hosts: dict[str, list[Measured]] = {}
    for m in seen.instances:
        if m.status.memory_limit_bytes:
            hosts.setdefault(m.status.host or m.instance, []).append(m)
    for host, all_here in hosts.items():
        here = [m for m in all_here if m.fresh]
        names = ", ".join(sorted(m.instance for m in here)[:NAMES]) + (" and more" if len(here) > NAMES else "")
        fires = settings.alert_memory
        if not here:
            yield Reading("resource_exhaustion", host, "unknown", f"memory at {host} is unknown", None, fires)
            continue
        fullest = min(here, key=lambda m: m.status.memory_available_bytes / m.status.memory_limit_bytes)
        limit = fullest.status.memory_limit_bytes
        used = max(0, limit - fullest.status.memory_available_bytes)
        weights = sum(m.status.loaded_bytes for m in here)
        text = f"{_percent(used / limit)} of {limit / 2**30:.1f} GiB at {host} is in use ({names})"
        deployments = {m.status.deployment for m in here if m.status.deployment}
        deployment = deployments.pop() if len(deployments) == 1 else ""
        verdict = judge(used / limit, fires, settings.alert_memory_clear)
        reading = Reading("resource_exhaustion", host, verdict, text, used / limit, fires, deployment)
        yield _with_weights(reading, used, weights) if used and weights >= WEIGHTS_DOMINATE * used else reading


def _with_weights(reading: Reading, used: int, weights: int) -> Reading:
    """The same where scaling cannot help: each new instance would load the weights again."""
    share = _percent(min(1.0, weights / used))
    return replace(
        reading,
        text=f"{reading.text}; weights are {share} of it, so more instances would not help",
        action="investigate",
        advice="Weights take most of it, and another instance loads them again: set QUANTIZATION=8bit or more "
        "EXPERT_SHARDS with workers on other hosts, or give this host more memory.",
    )


# -- experts ---------------------------------------------------------------------------------------------------------


def expert_imbalance(seen: Observation, settings: MonitorSettings) -> Iterable[Reading]:
    """The busiest shard's tokens over the mean of all shards, by the routers' counts."""
    fires = settings.alert_imbalance
    for deployment, routers in by_deployment(seen.of("router", fresh=False)).items():
        tokens = shard_tokens(_measured(routers))
        total = tokens.total()
        if total == 0 and _complete(routers):
            text = f"nothing was asked of {deployment} in {seen.window:g} s"
            yield Reading("expert_imbalance", deployment, "good", text, None, fires, deployment, "expert")
            continue
        if total < settings.alert_min_tokens:
            text = f"the balance of {deployment}'s shards is unknown: {total} tokens in {seen.window:g} s"
            yield Reading("expert_imbalance", deployment, "unknown", text, None, fires, deployment, "expert")
            continue
        shard, most = tokens.most_common(1)[0]
        value = most * len(tokens) / total
        text = f"shard {shard} of {deployment} gets {value:.2f} times the mean of {len(tokens)} shards"
        verdict = judge(value, fires, settings.alert_imbalance_clear)
        yield Reading("expert_imbalance", deployment, verdict, text, value, fires, deployment, "expert")


# -- queues ----------------------------------------------------------------------------------------------------------


def queue_saturated(seen: Observation, settings: MonitorSettings) -> Iterable[Reading]:
    """What waits over what may wait, per instance."""
    fires = settings.alert_queue
    for m in seen.instances:
        s = m.status
        if not s.queue_limit:
            continue
        value = s.waiting / s.queue_limit
        verdict = judge(value, fires, settings.alert_queue_clear) if m.fresh else "unknown"
        text = f"{s.waiting} of at most {s.queue_limit} wait at {s.service} {s.instance}"
        if not m.fresh:
            text = f"how many wait at {s.service} {s.instance} is unknown"
        known = value if m.fresh else None
        yield Reading(
            "queue_saturated", s.instance, verdict, text, known, fires, s.deployment, s.service, instance=s.instance
        )
