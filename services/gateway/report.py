"""/performance-report: what was measured, and what follows from it. Pure functions over real observations."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

REPORT_SECONDS = 60.0
BALANCED = 1.5


class Window:
    """The last observations, each with its time."""

    def __init__(self, size: int) -> None:
        self._values: deque[tuple[float, float]] = deque(maxlen=size)

    def add(self, now: float, value: float) -> None:
        self._values.append((now, value))

    def since(self, start: float) -> list[float]:
        return [value for at, value in self._values if at >= start]


class Rate:
    """How often something happened, counted by the second."""

    def __init__(self, seconds: int = 2 * int(REPORT_SECONDS)) -> None:
        self._counts: deque[list[int]] = deque(maxlen=seconds)

    def add(self, now: float) -> None:
        second = int(now)
        if self._counts and self._counts[-1][0] >= second:
            self._counts[-1][1] += 1
        else:
            self._counts.append([second, 1])

    def since(self, start: float) -> int:
        return sum(count for second, count in self._counts if second >= int(start))


def percentile(values: Sequence[float], q: float) -> float | None:
    """The q-quantile by nearest rank; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(q * len(ordered)) - 1))]


def latency(values: Sequence[float]) -> dict[str, float | int | None]:
    """Count and percentiles in milliseconds."""
    result: dict[str, float | int | None] = {"count": len(values)}
    for name, q in (("p50_ms", 0.5), ("p95_ms", 0.95), ("p99_ms", 0.99)):
        value = percentile(values, q)
        result[name] = None if value is None else round(value * 1000, 3)
    return result


def recommendations(*, waiting: int, error_rate: float | None, skew: float | None, kv_usage: float | None) -> list[str]:
    """What an operator should look at, from the figures of the report."""
    found = []
    if waiting:
        found.append(f"{waiting} generations wait in line: add routers or raise BATCH_SIZE")
    if error_rate is not None and error_rate > 0.05:
        found.append(f"{error_rate:.1%} of generations failed: see /health and the routers' logs")
    if skew is not None and skew > BALANCED:
        found.append(f"the busiest expert of a layer takes {skew:.1f} times the mean: add replicas of its shard")
    if kv_usage is not None and kv_usage > 0.9:
        found.append(f"{kv_usage:.0%} of the KV blocks are in use: raise KV_CACHE_MB or add routers")
    return found
