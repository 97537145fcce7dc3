"""What the fleet did lately: reports made into figures. Pure; the clock is passed in.

A report that is late, or was never heard, is a state of its own: an instance is *fresh* or *stale*, a figure that
nobody reported is None, and neither ever counts as zero.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from shared.histogram import Counts, added, quantile, since
from shared.status import Status

FRESH_SECONDS = 2.5
"""A report comes each second; an older one says nothing about now."""
FORGOTTEN_SECONDS = 60.0
"""An instance that was silent for so long is no part of an observation any more."""


@dataclass(frozen=True)
class Measured:
    """One instance: its last report, and what it did between the first and last report of the window."""

    status: Status
    age: float
    """Seconds since the report came."""
    seconds: float = 0.0
    """Between the two reports; 0: there is only one, and nothing below is known."""
    cpu: float = 0.0
    """Mean share of one core."""
    busy: float = 0.0
    """Seconds of computing; workers report them."""
    requests: int = 0
    tokens: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    """By code of shared/errors.py."""
    latencies: dict[str, Counts] = field(default_factory=dict)
    cache_lookups: int = 0
    cache_hits: int = 0
    expert_tokens: tuple[tuple[int, ...], ...] = ()
    """Routers: [MoE layers][experts]."""
    shard_tokens: tuple[tuple[int, ...], ...] = ()
    """Routers: [MoE layers][shards]."""

    @property
    def fresh(self) -> bool:
        return self.age <= FRESH_SECONDS

    @property
    def instance(self) -> str:
        return self.status.instance

    @property
    def service(self) -> str:
        return self.status.service


@dataclass(frozen=True)
class Observation:
    """The fleet over the last `window` seconds, at the time `now`."""

    now: float
    """Unix seconds."""
    window: float
    instances: tuple[Measured, ...]
    """Ordered by service and instance."""
    connected: bool = True
    """Whether we hear anybody: without NATS, silence says nothing."""

    def of(self, service: str, *, fresh: bool = True) -> list[Measured]:
        """Instances of `service`; `fresh`: only those whose report is."""
        return [m for m in self.instances if m.service == service and (m.fresh or not fresh)]

    def ready(self, service: str) -> list[Measured]:
        """Fresh instances of `service` that are ready."""
        return [m for m in self.of(service) if m.status.state == "ready"]

    def stale(self, service: str) -> list[Measured]:
        """Instances of `service` that have not been heard of lately and did not say that they go."""
        return [m for m in self.of(service, fresh=False) if not m.fresh and m.status.state != "draining"]

    def latency(self, service: str, name: str) -> Counts:
        """Counts per bucket of all fresh instances of `service` together."""
        return added(m.latencies.get(name, ()) for m in self.of(service))

    def quantile(self, service: str, name: str, q: float) -> float | None:
        """Seconds; None if nobody measured anything."""
        return quantile(self.latency(service, name), q)


class History:
    """The reports of the last seconds, by instance."""

    def __init__(self, seconds: float, *, spacing: float = 0.0) -> None:
        """Keep the reports of so many seconds; of several within `spacing` seconds the first, and the newest of all."""
        self._seconds = seconds
        self._spacing = spacing
        self._reports: dict[tuple[str, str], deque[tuple[float, Status]]] = {}

    def observe(self, status: Status, now: float) -> None:
        """Take note of a report.

        Args:
            status: the report.
            now: when it came, on the monotonic clock.

        """
        key = (status.service, status.instance)
        if key not in self._reports:
            self._forget(now)
        reports = self._reports.setdefault(key, deque())
        if reports and reports[-1][1].started != status.started:  # another process of the same name: counts anew
            reports.clear()
        if len(reports) > 1 and reports[-1][0] - reports[-2][0] < self._spacing:
            reports.pop()
        reports.append((now, status))
        while now - reports[0][0] > self._seconds:
            reports.popleft()

    def observation(
        self, monotonic: float, now: float, *, window: float | None = None, connected: bool = True
    ) -> Observation:
        """The last `window` seconds.

        Args:
            monotonic: the time, on the clock of `observe`.
            now: the same in Unix seconds.
            window: seconds; None: all that is remembered.
            connected: whether reports could be heard.

        """
        window = self._seconds if window is None else min(window, self._seconds)
        self._forget(monotonic)
        instances = [self._measured(r, monotonic, window) for _, r in sorted(self._reports.items())]
        return Observation(now, window, tuple(instances), connected)

    def _forget(self, now: float) -> None:
        """Drop who was silent for too long; also when nobody looks, as names of processes do not come back."""
        self._reports = {k: r for k, r in self._reports.items() if now - r[-1][0] <= FORGOTTEN_SECONDS}

    def _measured(self, reports: Sequence[tuple[float, Status]], now: float, window: float) -> Measured:
        end, last = reports[-1]
        inside = [(at, status) for at, status in reports if now - at <= window]
        if len(inside) < 2:
            return Measured(last, now - end)
        start, first = inside[0]
        return Measured(
            status=last,
            age=now - end,
            seconds=end - start,
            cpu=sum(status.cpu for _, status in inside[1:]) / (len(inside) - 1),
            busy=max(0.0, last.busy_seconds - first.busy_seconds),
            requests=_grown(first.requests_total, last.requests_total),
            tokens=_grown(first.tokens_total, last.tokens_total),
            failures={
                code: grown
                for code, count in last.errors.items()
                if (grown := _grown(first.errors.get(code, 0), count))
            },
            latencies={name: since(first.latencies.get(name, ()), counts) for name, counts in last.latencies.items()},
            cache_lookups=_grown(first.cache_lookups, last.cache_lookups),
            cache_hits=_grown(first.cache_hits, last.cache_hits),
            expert_tokens=_rows_grown(first.expert_tokens, last.expert_tokens),
            shard_tokens=_rows_grown(first.shard_tokens, last.shard_tokens),
        )


def _rows_grown(before: Sequence[Sequence[int]], now: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """What each figure has grown by; from zero, where there was no row yet."""
    before = before or [[0] * len(row) for row in now]
    return tuple(
        tuple(_grown(old, new) for old, new in zip(was, row, strict=False))
        for was, row in zip(before, now, strict=False)
    )


def _grown(before: int, now: int) -> int:
    return max(0, now - before)


def shard_tokens(routers: Sequence[Measured]) -> Counter[int]:
    """Tokens sent to each shard, of all layers; a router that does not count them sends expert e's to shard e mod S."""
    tokens: Counter[int] = Counter()
    for m in routers:
        size = m.status.num_shards
        if m.shard_tokens:
            rows = [dict(enumerate(row)) for row in m.shard_tokens]
        else:
            rows = [{s: sum(row[s::size]) for s in range(size)} for row in (m.expert_tokens if size else ())]
        for row in rows:
            tokens.update(row)
    return tokens
