"""Latencies as counts per bucket, which may be added up over instances and taken apart over time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

BOUNDS = tuple(round(0.0005 * 1.25**n, 6) for n in range(56))
"""Seconds, 0.5 ms to 107 s: the upper bounds of the buckets, each a quarter above the one before; one more is open."""

Counts = tuple[int, ...]
"""Observations per bucket, as many as BOUNDS and one; without the zeros at the end."""


class Histogram:
    """Counts since the start."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(BOUNDS, seconds)] += 1

    def counts(self) -> Counts:
        return trimmed(self._counts)


def trimmed(counts: Sequence[int]) -> Counts:
    """`counts` without the zeros at its end."""
    size = len(counts)
    while size and not counts[size - 1]:
        size -= 1
    return tuple(counts[:size])


def added(parts: Iterable[Sequence[int]]) -> Counts:
    """The sum of several instances' counts."""
    total = [0] * (len(BOUNDS) + 1)
    for part in parts:
        for bucket, count in enumerate(part[: len(total)]):
            total[bucket] += count
    return trimmed(total)


def since(before: Sequence[int], now: Sequence[int]) -> Counts:
    """What `now` has over `before`, an earlier count of the same instance."""
    old = [*before, *[0] * len(now)]
    return trimmed([max(0, count - old[bucket]) for bucket, count in enumerate(now)])


def quantile(counts: Sequence[int], q: float) -> float | None:
    """Seconds below which a share `q` of the observations lies, linear within its bucket; None of nothing.

    Off by less than the bucket's width, a quarter. Of the open bucket its lower bound is given.
    """
    rank = q * sum(counts)
    below = 0
    for bucket, count in enumerate(counts):
        if count and below + count >= rank:
            if bucket >= len(BOUNDS):
                return BOUNDS[-1]
            low = BOUNDS[bucket - 1] if bucket else 0.0
            return low + (BOUNDS[bucket] - low) * max(0.0, rank - below) / count
        below += count
    return None


def share_below(counts: Sequence[int], seconds: float) -> float | None:
    """The share of observations of at most `seconds`, linear within its bucket; None of nothing."""
    total = sum(counts)
    if not total:
        return None
    edge = bisect_left(BOUNDS, seconds)
    below = float(sum(counts[:edge]))
    if edge < min(len(counts), len(BOUNDS)):
        low = BOUNDS[edge - 1] if edge else 0.0
        below += counts[edge] * (seconds - low) / (BOUNDS[edge] - low)
    return below / total
