"""The last hour, a point each ten seconds: what the page draws. Pure; the clock is passed in.

A figure that nobody measured is None, and a time without points stays one: the drawing has a gap there.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from services.monitor.observations import Observation
from services.monitor.report import fleet_report, own_failures

STEP_SECONDS = 10.0
HOUR_SECONDS = 3600.0


@dataclass(frozen=True)
class Point:
    """The fleet over the `STEP_SECONDS` before `time` (Unix seconds). Latencies are milliseconds."""

    time: float
    tokens_per_second: float | None = None
    requests_per_second: float | None = None
    failures_per_second: float | None = None
    """Of the fleet's own, at the gateways."""
    first_token_p50_ms: float | None = None
    first_token_p95_ms: float | None = None
    first_token_p99_ms: float | None = None
    inter_token_p95_ms: float | None = None
    end_to_end_p95_ms: float | None = None
    running: int | None = None
    waiting: int | None = None
    """Requests at the gateways."""
    ready_experts: int | None = None
    ready_routers: int | None = None


def point(seen: Observation) -> Point:
    """What `seen`, an observation of the last `STEP_SECONDS`, adds to the hour; all unknown without a connection."""
    if not seen.connected:
        return Point(seen.now)
    report = fleet_report(seen)
    latency = report.latency.get("gateway", {})
    first, between, whole = (latency.get(name) for name in ("time_to_first_token", "inter_token", "end_to_end"))
    gateways = seen.of("gateway")
    measured = [m for m in gateways if m.seconds]
    heard = bool(seen.instances)
    return Point(
        seen.now,
        tokens_per_second=report.throughput.output_tokens_per_second,
        requests_per_second=report.throughput.requests_per_second,
        failures_per_second=sum(own_failures(m.failures) / m.seconds for m in measured) if measured else None,
        first_token_p50_ms=first.p50_ms if first else None,
        first_token_p95_ms=first.p95_ms if first else None,
        first_token_p99_ms=first.p99_ms if first else None,
        inter_token_p95_ms=between.p95_ms if between else None,
        end_to_end_p95_ms=whole.p95_ms if whole else None,
        running=sum(m.status.running for m in gateways) if gateways else None,
        waiting=sum(m.status.waiting for m in gateways) if gateways else None,
        ready_experts=len(seen.ready("expert")) if heard else None,
        ready_routers=len(seen.ready("router")) if heard else None,
    )


class Timeline:
    """Points of the last hour; at most one each step, so their number is bounded."""

    def __init__(self, seconds: float = HOUR_SECONDS, step: float = STEP_SECONDS) -> None:
        self.seconds = seconds
        self.step = step
        self._points: deque[Point] = deque(maxlen=math.ceil(seconds / step))
        self._last: float | None = None

    def due(self, monotonic: float) -> bool:
        """Whether a step has passed since the last point."""
        return self._last is None or monotonic - self._last >= self.step

    def add(self, new: Point, monotonic: float) -> None:
        """Take a point that was made at `monotonic`; one that comes too early is left out."""
        if self.due(monotonic):
            # Steps are counted from the first, so that late ticks do not add up.
            late = 0.0 if self._last is None else (monotonic - self._last) % self.step
            self._last = monotonic - late
            self._points.append(new)

    def points(self, now: float) -> list[Point]:
        """Those of the hour before the Unix time `now`, the oldest first."""
        return sorted((p for p in self._points if now - self.seconds <= p.time <= now), key=lambda p: p.time)
