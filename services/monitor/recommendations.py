"""What an operator should do, from the figures of the fleet's report. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from services.monitor.observations import Observation
from shared.status import Status

SLOW_SECONDS = 0.5
FAILING = 0.05
FEW_HITS = 0.6
ENOUGH_LOOKUPS = 100
FULL = 0.9
SKEWED = 1.5
NAMED = 5
"""Of a list; the rest is counted."""


def recommendations(
    seen: Observation,
    *,
    error_rate: float | None,
    worst: tuple[str, str] | None,
    lookups: int,
    hit_rate: float | None,
    missing: Mapping[str, Sequence[int]],
    single: Mapping[str, Sequence[int]],
    skew: Mapping[str, float | None],
) -> tuple[str, ...]:
    """Sentences, the most pressing first.

    Args:
        seen: the fleet.
        error_rate: the gateways' own failures over all requests, if any ended.
        worst: (code, instance) of the most failures.
        lookups: in the answer cache.
        hit_rate: of these.
        missing: shards without a ready worker that a router needs, by deployment.
        single: shards with one ready worker only, by deployment.
        skew: the busiest worker's or shard's tokens over the mean, by deployment.

    """
    found = []
    if not seen.connected:
        found.append("NATS does not answer: start it, or correct NATS_URL; what is shown is the last that was heard")
    for name, shards in missing.items():
        if shards:
            found.append(f"no worker serves {_shards(shards)} of {name}: start an expert worker, or see its log")
    for service in sorted({m.service for m in seen.instances}):
        if silent := seen.stale(service) if seen.connected else []:
            who = named([m.instance for m in silent])
            found.append(f"{service} {who} has fallen silent: see its log, and start it again if it does not return")
    if error_rate is not None and error_rate > FAILING:
        where = f", most with {worst[0]} at {worst[1]}" if worst else ""
        found.append(f"{error_rate:.1%} of requests failed{where}: see that instance's log")
    full = [m for m in seen.of("router") if m.status.kv_usage > FULL]
    if full:
        who = named([m.instance for m in full])
        found.append(f"over {FULL:.0%} of the KV blocks of {who} are in use: raise KV_CACHE_MB or add routers")
    hosts = sorted({m.status.host for m in seen.instances if m.fresh and _memory_full(m.status)})
    if hosts:
        found.append(f"over {FULL:.0%} of the memory is in use at {named(hosts)}: move services elsewhere")
    slow = seen.quantile("gateway", "time_to_first_token", 0.95)
    if slow is not None and slow > SLOW_SECONDS:
        found.append(f"the first token takes {slow * 1000:.0f} ms at p95: add expert workers, or routers if they queue")
    gateways = seen.of("gateway")
    running, waiting = sum(m.status.running for m in gateways), sum(m.status.waiting for m in gateways)
    if waiting > running:
        found.append(f"{waiting} requests wait at the gateways while {running} run: add routers, or raise BATCH_SIZE")
    for name, value in skew.items():
        if value is not None and value > SKEWED:
            found.append(f"the busiest worker of {name} takes {value:.1f} times the mean: give its shards more workers")
    if hit_rate is not None and lookups >= ENOUGH_LOOKUPS and hit_rate < FEW_HITS:
        found.append(
            f"only {hit_rate:.0%} of {lookups} look-ups found an answer: raise CACHE_TTL_SECONDS or Redis' maxmemory, "
            "or set ENABLE_CACHING=false if requests never repeat"
        )
    for name, shards in single.items():
        if shards and not missing.get(name):
            found.append(f"{_shards(shards)} of {name}: one worker only; a second would make its loss unnoticeable")
    if any(not m.status.state_stored for m in seen.ready("monitor")):
        found.append("decisions are not kept: turn JetStream on in NATS, or see the monitor's log")
    return tuple(found)


def named(things: Sequence[object]) -> str:
    """`0, 1, 2`, and how many more."""
    more = f" and {len(things) - NAMED} more" if len(things) > NAMED else ""
    return ", ".join(str(thing) for thing in things[:NAMED]) + more


def _shards(shards: Sequence[int]) -> str:
    return f"shard{'s' if len(shards) > 1 else ''} {named(shards)}"


def _memory_full(status: Status) -> bool:
    limit = status.memory_limit_bytes
    return bool(limit) and 1 - status.memory_available_bytes / limit > FULL
