"""Observations of fleets that a test makes up."""

from __future__ import annotations

from services.monitor.observations import Measured, Observation
from shared.histogram import Histogram
from shared.status import State, Status

GIB = 2**30
LOOK_SECONDS = 10.0


def latencies(seconds: float, count: int = 100) -> tuple[int, ...]:
    """`count` observations of so many seconds."""
    histogram = Histogram()
    for _ in range(count):
        histogram.observe(seconds)
    return histogram.counts()


def expert(
    number: int,
    busy: float = 0.5,
    *,
    state: State = "ready",
    age: float = 0.5,
    shards: tuple[int, ...] = (0, 1),
    num_shards: int = 0,
    started: float = 0.0,
    weights: float = 0.1,
    available: float = 100.0,
) -> Measured:
    """A worker that computes for a share `busy` of the time; memory in GiB, of which it has 1 beside its weights."""
    status = Status(
        service="expert",
        instance=f"expert-{number}",
        state=state,
        started=started or float(number),
        shards=shards if state == "ready" else (),
        num_shards=num_shards,
        cores=1.0,
        memory_bytes=int((1 + weights) * GIB),
        loaded_bytes=int(weights * GIB),
        memory_limit_bytes=int(200 * GIB),
        memory_available_bytes=int(available * GIB),
    )
    return Measured(status, age, LOOK_SECONDS, busy=busy * LOOK_SECONDS)


def router(number: int = 0, cpu: float = 0.1, *, waiting: int = 0, kv: float = 0.1, tokens: int = 1000) -> Measured:
    """A router with a line of so many."""
    status = Status(
        service="router",
        instance=f"router-{number}",
        state="ready",
        cores=1.0,
        waiting=waiting,
        kv_usage=kv,
        started=1.0,
    )
    return Measured(status, 0.5, LOOK_SECONDS, cpu=cpu, tokens=tokens)


def gateway(first_token: float | None = 0.05, *, waiting: int = 0, refused: int = 0, age: float = 0.5) -> Measured:
    """A gateway whose requests have waited so long for their first token; None: there was none."""
    found = {} if first_token is None else {"time_to_first_token": latencies(first_token)}
    failures = {"overloaded": refused} if refused else {}
    status = Status(service="gateway", instance="gateway-0", state="ready", waiting=waiting, started=1.0)
    return Measured(status, age, LOOK_SECONDS, failures=failures, latencies=found)


def seen(now: float, *instances: Measured, connected: bool = True) -> Observation:
    return Observation(now, LOOK_SECONDS, tuple(sorted(instances, key=lambda m: (m.service, m.instance))), connected)


def fleet(now: float, count: int, busy: float, *others: Measured, waiting: int = 0) -> Observation:
    """`count` workers that are so busy, a router and a gateway."""
    experts = [expert(n, busy) for n in range(count)]
    return seen(now, *experts, *(others or (router(waiting=waiting), gateway())))
