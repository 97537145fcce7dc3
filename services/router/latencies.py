"""How long expert calls take, by their size: after which time one is called slow, and after which stalled. A pure core.

A call that outlives 95 % of its like is sent to a second worker ("The Tail at Scale", Dean and Barroso, CACM 2013).
"""

from __future__ import annotations

WINDOW = 128
REFRESH = 16
"""The percentile is worked out anew after so many calls."""
LEAST_SAMPLES = 16
QUANTILE = 0.95
LEAST_HEDGE_SECONDS = 0.02
"""Below this, what differs between two calls is the operating system's business."""
STALL_FACTOR = 4.0
LEAST_STALL_SECONDS = 0.5
UNKNOWN_STALL_SECONDS = 2.0
MOST_STALL_SECONDS = 2.0
"""Beyond what is usual: however slow calls are, a worker that has died is noticed soon after."""
SIZES = 32


class Latencies:
    """The latest latencies of each size of call, a size being a power of two of rows."""

    def __init__(self) -> None:
        self._samples: list[list[float]] = [[] for _ in range(SIZES)]
        self._counts = [0] * SIZES
        self._slow: list[float | None] = [None] * SIZES

    @staticmethod
    def size(rows: int) -> int:
        """The size of a call of so many rows."""
        return min(rows.bit_length(), SIZES - 1)

    def add(self, size: int, seconds: float) -> None:
        """One call of this size was answered after `seconds`.

        What took longer than a stall counts as one: an outage must not teach that calls are slow, or the next worker
        that dies would be noticed late.
        """
        samples, count = self._samples[size], self._counts[size]
        seconds = min(seconds, self.stalled_after(size))
        if len(samples) < WINDOW:
            samples.append(seconds)
        else:
            samples[count % WINDOW] = seconds
        self._counts[size] = count + 1
        if (count + 1) % REFRESH == 0:
            self._slow[size] = sorted(samples)[int(QUANTILE * len(samples))]

    def hedge_after(self, size: int) -> float | None:
        """Seconds after which a call of this size is one of the slowest; None if too little is known."""
        slow = self._slow[size]
        return None if slow is None else max(slow, LEAST_HEDGE_SECONDS)

    def stalled_after(self, size: int) -> float:
        """Seconds after which a call of this size is taken for lost with its worker."""
        slow = self._slow[size]
        if slow is None:
            return UNKNOWN_STALL_SECONDS
        return max(min(STALL_FACTOR * slow, slow + MOST_STALL_SECONDS), LEAST_STALL_SECONDS)
