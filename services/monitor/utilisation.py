"""How much of what there is a service uses: an observation made into the four figures that scaling looks at. Pure.

Each is a share of its target, 1.0 being all of it, or None where it is not known. Unknown is never zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from services.monitor.observations import Measured, Observation

Service = Literal["expert", "router"]
Metric = Literal["cpu_usage", "memory_usage", "response_time", "queue_depth"]
Latency = Literal["time_to_first_token", "inter_token", "end_to_end"]
SERVICES: tuple[Service, ...] = ("expert", "router")
WEIGHTS_SHARE = 0.5
"""Of a process' memory: where weights are more, another worker, which holds weights too, relieves nothing."""


@dataclass(frozen=True)
class Targets:
    """What counts as 1.0."""

    latency: Latency = "time_to_first_token"
    latency_seconds: float = 0.5
    """Of the 95th percentile."""
    waiting: float = 4.0
    """Requests in line for each worker or router."""


@dataclass(frozen=True)
class Usage:
    """One metric of one service."""

    metric: Metric
    value: float | None
    """Share of the target; None: unknown."""
    text: str
    counts: bool = True
    """Whether it says anything about this service's number now."""
    relieves: bool = True
    """Whether more of the service would lower it."""


def usages(service: Service, observation: Observation, targets: Targets) -> tuple[Usage, ...]:
    """The four metrics of `service`.

    Line and latency are the whole fleet's, and go to the account of whichever of the two services is busier: more of
    the other would wait as well.
    """
    cpu = {name: _cpu(name, observation) for name in SERVICES}
    other: Service = "router" if service == "expert" else "expert"
    mine, theirs = cpu[service].value, cpu[other].value
    bound = _busier(service, mine, theirs)
    memory = _expert_memory(observation) if service == "expert" else _router_memory(observation)
    shared = (_response(observation, targets), _queue(service, observation, targets))
    return (cpu[service], memory, *(u if bound else _not_ours(u, other) for u in shared))


def _busier(service: Service, mine: float | None, theirs: float | None) -> bool:
    if mine is None or theirs is None:
        return mine is not None or service == "expert"
    return mine >= theirs if service == "expert" else mine > theirs


def _not_ours(usage: Usage, other: Service) -> Usage:
    if usage.value is None:  # not to know how requests fare matters to both
        return usage
    return Usage(usage.metric, usage.value, f"{usage.text}; the {other}s are busier", counts=False)


def _cpu(service: Service, observation: Observation) -> Usage:
    """Mean over the ready ones: of CPU time per core, or (workers) of the time spent computing, whichever is more."""
    shares = [share for m in observation.ready(service) if (share := _busy(m)) is not None]
    if not shares:
        return Usage("cpu_usage", None, f"no ready {service} has reported for long enough")
    mean = sum(shares) / len(shares)
    return Usage("cpu_usage", mean, f"{mean:.0%} busy, mean of {len(shares)}")


def _busy(measured: Measured) -> float | None:
    if not measured.seconds:
        return None
    computing = measured.busy / measured.seconds  # a GPU's work is no CPU time
    if measured.status.cores:
        return max(computing, measured.cpu / measured.status.cores)
    return computing or None


def _expert_memory(observation: Observation) -> Usage:
    """The most pressed worker's memory beside its weights, of what it could have beside them."""
    shares, heavy = [], 0
    ready = observation.ready("expert")
    for m in ready:
        s = m.status
        if not s.memory_limit_bytes:
            continue
        beside = max(0, s.memory_bytes - s.loaded_bytes)
        shares.append(beside / max(1, beside + s.memory_available_bytes))
        heavy += s.loaded_bytes >= WEIGHTS_SHARE * s.memory_bytes
    if not shares:
        return Usage("memory_usage", None, "no ready expert reports its memory")
    most = max(shares)
    if heavy * 2 > len(ready):
        text = f"{most:.0%} beside the weights, which are most of it: another worker would need as much again"
        return Usage("memory_usage", most, text, relieves=False)
    return Usage("memory_usage", most, f"{most:.0%} beside the weights, of the most pressed")


def _router_memory(observation: Observation) -> Usage:
    """The KV cache is a router's memory: it is taken at the start, and what counts is how full it is."""
    shares = [m.status.kv_usage for m in observation.ready("router")]
    if not shares:
        return Usage("memory_usage", None, "no router is ready")
    mean = sum(shares) / len(shares)
    return Usage("memory_usage", mean, f"{mean:.0%} of the KV blocks, mean of {len(shares)}")


def _heard(observation: Observation, services: Sequence[str]) -> str | None:
    """What keeps the figures of `services` from being known; None: nothing."""
    for service in services:
        if stale := observation.stale(service):
            return f"{stale[0].instance} has not been heard of for {stale[0].age:.0f} s"
        if not any(m.seconds for m in observation.ready(service)):
            return f"no ready {service} has reported for long enough"
    return None


def _response(observation: Observation, targets: Targets) -> Usage:
    if problem := _heard(observation, ("gateway",)):
        return Usage("response_time", None, problem)
    p95 = observation.quantile("gateway", targets.latency, 0.95)
    if p95 is None:
        if _flows(observation):
            return Usage("response_time", 0.0, f"nothing that {targets.latency} could be measured by came in")
        return Usage("response_time", None, "requests run, and none has shown yet how long it takes")
    text = f"p95 of {targets.latency} is {1000 * p95:.0f} ms, the target {1000 * targets.latency_seconds:.0f}"
    return Usage("response_time", p95 / targets.latency_seconds, text)


def _flows(observation: Observation) -> bool:
    """Whether nothing runs or waits, or tokens come: then what was not measured did not happen."""
    gateways = observation.of("gateway")
    busy = any(m.status.running or m.status.waiting for m in gateways)
    return not busy or any(any(m.latencies.get("inter_token", ())) for m in gateways)


def _queue(service: Service, observation: Observation, targets: Targets) -> Usage:
    """Those in line, and those who were not let into it, over the target for so many workers."""
    if problem := _heard(observation, ("gateway", "router")):
        return Usage("queue_depth", None, problem)
    count = len(observation.ready(service))
    if not count:
        return Usage("queue_depth", None, f"no {service} is ready")
    waiting = sum(m.status.waiting for name in ("gateway", "router") for m in observation.of(name))
    refused = sum(m.failures.get("overloaded", 0) for m in observation.of("gateway"))
    text = f"{waiting} wait, {refused} were refused; the target is {targets.waiting:g} for each of {count}"
    return Usage("queue_depth", (waiting + refused) / (targets.waiting * count), text)
