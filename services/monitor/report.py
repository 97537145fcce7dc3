"""The whole fleet's report: an observation made into figures for people and tools. Pure.

What nobody measured is None; an instance that fell silent is named, and counts for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.monitor.findings import shards_missing
from services.monitor.observations import Measured, Observation, shard_tokens
from services.monitor.recommendations import recommendations
from shared.errors import HTTP_STATUS
from shared.histogram import Counts, quantile
from shared.utilisation import entropy, imbalance

REPORT_SECONDS = 60.0
SERVICES = ("gateway", "router", "expert", "monitor")


@dataclass(frozen=True)
class Percentiles:
    """One latency of all instances of a service together, in milliseconds; None: nothing was measured."""

    count: int
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None


@dataclass(frozen=True)
class Throughput:
    """What the gateways sent; None: no gateway is heard."""

    output_tokens_per_second: float | None
    requests_per_second: float | None


@dataclass(frozen=True)
class Failures:
    """Where most failures are: so many with this code at this instance."""

    service: str
    instance: str
    code: str
    count: int


@dataclass(frozen=True)
class Errors:
    """Failed work of the window. Only codes with HTTP status 500 and above are the fleet's own failures."""

    rate: float | None
    """The gateways' own failures over all requests that ended; None: none ended."""
    by_service: dict[str, dict[str, int]]
    """Failures by service and code, those of clients among them."""
    worst: Failures | None


@dataclass(frozen=True)
class Cache:
    """The gateways' answer caches; None of no look-up."""

    lookups: int
    hits: int
    hit_rate: float | None


@dataclass(frozen=True)
class ShardReport:
    """Who holds a shard."""

    shard: int
    ready: tuple[str, ...]
    """Workers that serve it."""
    loading: tuple[str, ...]
    """Workers that are to."""
    needed: bool
    """A ready router exists, so a shard without a worker fails requests."""


@dataclass(frozen=True)
class LayerReport:
    """How one MoE layer's gate spread its tokens, over all routers; None of no token."""

    layer: int
    """Its place among the MoE layers, from 0."""
    tokens: tuple[int, ...]
    """Per expert."""
    entropy: float | None
    """1: even; 0: one expert only."""
    imbalance: float | None
    """Busiest expert over the mean."""


@dataclass(frozen=True)
class DeploymentReport:
    """One model's part of the fleet."""

    deployment: str
    model: str
    epoch: int
    """Of the placement that routers dispatch by; 0: expert e belongs to shard e mod S."""
    shards: tuple[ShardReport, ...]
    shard_imbalance: float | None
    """Tokens of the busiest shard over the mean; None of no token."""
    worker_imbalance: float | None
    """Tokens of the busiest ready worker over the mean, as workers counted them."""
    layers: tuple[LayerReport, ...]


@dataclass(frozen=True)
class InstanceReport:
    """One process. Rates and `cpu` (cores) are means over the window; None: unknown."""

    service: str
    instance: str
    deployment: str
    state: str
    fresh: bool
    age_seconds: float
    host: str
    address: str
    running: int
    waiting: int
    queue_limit: int | None
    requests_per_second: float | None
    tokens_per_second: float | None
    failures: dict[str, int]
    cpu: float | None
    cores: float | None
    memory_bytes: int | None
    memory_used: float | None
    """Share of what there is for it and its neighbours, 0 to 1."""
    kv_usage: float | None
    """Routers: share of the KV blocks in use."""
    shards: tuple[int, ...]
    wanted_shards: tuple[int, ...]
    loaded: float | None
    """Share of the weights that are loaded, while they are being loaded."""
    state_stored: bool | None
    """Monitors: whether decisions are kept."""


@dataclass(frozen=True)
class ServiceReport:
    """All instances of a service; `silent` ones have not been heard of lately and did not say that they go."""

    service: str
    instances: int
    ready: int
    silent: tuple[str, ...]
    running: int
    waiting: int


@dataclass(frozen=True)
class FleetReport:
    """The fleet over `window_seconds`, at the Unix time `time`."""

    time: float
    window_seconds: float
    connected: bool
    """False: the monitor hears nobody, and all this is as old as `time`."""
    throughput: Throughput
    latency: dict[str, dict[str, Percentiles]]
    """By service and name."""
    errors: Errors
    cache: Cache
    services: tuple[ServiceReport, ...]
    deployments: tuple[DeploymentReport, ...]
    instances: tuple[InstanceReport, ...]
    recommendations: tuple[str, ...]


def fleet_report(seen: Observation) -> FleetReport:
    """What `seen` says, and what an operator should do about it."""
    errors, cache = _errors(seen), _cache(seen)
    services = tuple(_service(seen, name) for name in _services(seen))
    deployments = tuple(_deployment(seen, name) for name in _deployments(seen))
    return FleetReport(
        time=seen.now,
        window_seconds=seen.window,
        connected=seen.connected,
        throughput=Throughput(
            _rate(seen.of("gateway"), [m.tokens for m in seen.of("gateway")]),
            _rate(seen.of("gateway"), [m.requests for m in seen.of("gateway")]),
        ),
        latency=_latencies(seen),
        errors=errors,
        cache=cache,
        services=services,
        deployments=deployments,
        instances=tuple(_instance(m) for m in sorted(seen.instances, key=_on_the_path)),
        recommendations=recommendations(
            seen,
            error_rate=errors.rate,
            worst=(errors.worst.code, errors.worst.instance) if errors.worst else None,
            lookups=cache.lookups,
            hit_rate=cache.hit_rate,
            missing={d.deployment: [s.shard for s in d.shards if s.needed and not s.ready] for d in deployments},
            single={d.deployment: [s.shard for s in d.shards if len(s.ready) == 1] for d in deployments},
            skew={d.deployment: _worst_skew(d) for d in deployments},
        ),
    )


def percentiles(counts: Counts) -> Percentiles:
    """p50, p95 and p99 of counts per bucket."""
    values = [quantile(counts, q) for q in (0.5, 0.95, 0.99)]
    p50, p95, p99 = (None if value is None else round(value * 1000, 3) for value in values)
    return Percentiles(sum(counts), p50, p95, p99)


def own_failures(failures: dict[str, int]) -> int:
    """Those of `failures`, by code, that are the fleet's and not the clients'."""
    return sum(count for code, count in failures.items() if HTTP_STATUS.get(code, 500) >= 500)


def _services(seen: Observation) -> list[str]:
    others = sorted({m.service for m in seen.instances} - set(SERVICES))
    return [*SERVICES, *others]


def _on_the_path(m: Measured) -> tuple[int, str, str]:
    """In the order of a request's way."""
    return (SERVICES.index(m.service) if m.service in SERVICES else len(SERVICES), m.service, m.instance)


def _deployments(seen: Observation) -> list[str]:
    return sorted({m.status.deployment for m in seen.instances if m.service in {"router", "expert"}} - {""})


def _rate(measured: Sequence[Measured], counts: Sequence[int]) -> float | None:
    """Per second, all instances together; None if none of them has been seen for long enough."""
    rates = [count / m.seconds for m, count in zip(measured, counts, strict=True) if m.seconds]
    return round(sum(rates), 3) if rates else None


def _latencies(seen: Observation) -> dict[str, dict[str, Percentiles]]:
    return {
        service: {name: percentiles(seen.latency(service, name)) for name in names}
        for service in _services(seen)
        if (names := sorted({name for m in seen.of(service) for name in m.latencies}))
    }


def _errors(seen: Observation) -> Errors:
    by_service: dict[str, dict[str, int]] = {}
    found: list[Failures] = []
    for m in seen.instances:
        for code, count in m.failures.items() if m.fresh else ():
            codes = by_service.setdefault(m.service, {})
            codes[code] = codes.get(code, 0) + count
            if HTTP_STATUS.get(code, 500) >= 500:
                found.append(Failures(m.service, m.instance, code, count))
    gateways = seen.of("gateway")
    ended = sum(m.requests + sum(m.failures.values()) for m in gateways)
    failed = sum(own_failures(m.failures) for m in gateways)
    # The cause lies deepest: a worker's failure shows again at its router and gateway.
    depth = {"expert": 2, "router": 1}
    worst = max(found, key=lambda f: (f.count, depth.get(f.service, 0)), default=None)
    return Errors(round(failed / ended, 5) if ended else None, by_service, worst)


def _cache(seen: Observation) -> Cache:
    lookups = sum(m.cache_lookups for m in seen.of("gateway"))
    hits = sum(m.cache_hits for m in seen.of("gateway"))
    return Cache(lookups, hits, round(hits / lookups, 4) if lookups else None)


def _service(seen: Observation, name: str) -> ServiceReport:
    fresh = seen.of(name)
    return ServiceReport(
        name,
        len(fresh),
        len(seen.ready(name)),
        tuple(m.instance for m in seen.stale(name)),
        sum(m.status.running for m in fresh),
        sum(m.status.waiting for m in fresh),
    )


def _deployment(seen: Observation, name: str) -> DeploymentReport:
    members = [m for m in seen.instances if m.status.deployment == name]
    fresh = [m for m in members if m.fresh]
    routers = [m for m in fresh if m.service == "router"]
    workers = [m for m in fresh if m.service == "expert"]
    num_shards = max((m.status.num_shards for m in members), default=0)
    needed = name in shards_missing([m.status for m in fresh])
    shards = tuple(
        ShardReport(
            shard,
            tuple(m.instance for m in workers if m.status.state == "ready" and shard in m.status.shards),
            tuple(m.instance for m in workers if shard in m.status.wanted_shards and shard not in m.status.shards),
            needed,
        )
        for shard in range(num_shards)
    )
    epoch = max((m.status.epoch for m in routers), default=0)
    layers = expert_layers(routers)
    ready = [m for m in workers if m.status.state == "ready" and m.seconds]
    return DeploymentReport(
        deployment=name,
        model=next((m.status.model for m in members), ""),
        epoch=epoch,
        shards=shards,
        shard_imbalance=_rounded([tokens for _, tokens in sorted(shard_tokens(routers).items())]),
        worker_imbalance=_rounded([m.tokens for m in ready]),
        layers=layers,
    )


def expert_layers(routers: Sequence[Measured]) -> tuple[LayerReport, ...]:
    """Tokens per MoE layer and expert of all `routers` together."""
    depth = max((len(m.status.expert_tokens) for m in routers), default=0)
    layers = []
    for layer in range(depth):
        rows = [m.expert_tokens[layer] for m in routers if layer < len(m.expert_tokens)]
        width = max(len(m.status.expert_tokens[layer]) for m in routers if layer < len(m.status.expert_tokens))
        tokens = tuple(sum(row[expert] for row in rows if expert < len(row)) for expert in range(width))
        even = entropy(tokens)
        layers.append(LayerReport(layer, tokens, None if even is None else round(even, 4), _rounded(tokens)))
    return tuple(layers)


def _rounded(counts: Sequence[int]) -> float | None:
    skew = imbalance(counts)
    return None if skew is None else round(skew, 3)


def _worst_skew(deployment: DeploymentReport) -> float | None:
    """Of workers if they counted anything, else of shards."""
    if deployment.worker_imbalance is not None:
        return deployment.worker_imbalance
    return deployment.shard_imbalance


def _instance(m: Measured) -> InstanceReport:
    s = m.status
    measured = m.fresh and m.seconds > 0
    limit, available = s.memory_limit_bytes, s.memory_available_bytes
    return InstanceReport(
        service=s.service,
        instance=s.instance,
        deployment=s.deployment,
        state=s.state,
        fresh=m.fresh,
        age_seconds=round(m.age, 1),
        host=s.host,
        address=s.address,
        running=s.running,
        waiting=s.waiting,
        queue_limit=s.queue_limit or None,
        requests_per_second=round(m.requests / m.seconds, 3) if measured else None,
        tokens_per_second=round(m.tokens / m.seconds, 2) if measured else None,
        failures=m.failures,
        cpu=round(m.cpu, 3) if measured else None,
        cores=s.cores or None,
        memory_bytes=s.memory_bytes or None,
        memory_used=round(1 - min(available, limit) / limit, 4) if limit else None,
        kv_usage=s.kv_usage if s.service == "router" else None,
        shards=s.shards,
        wanted_shards=s.wanted_shards,
        loaded=min(1.0, s.loaded_bytes / s.total_bytes) if s.state == "loading" and s.total_bytes else None,
        state_stored=s.state_stored if s.service == "monitor" else None,
    )
