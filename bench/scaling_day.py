"""A day of load, replayed against the scaling policy: `python -m bench.scaling_day [--seed N] [--json]`.

The load is made up, by a seeded script, as many services see it: quiet nights, a broad peak by day, noise, and bursts
of some minutes on top. The workers are a queue: each second's requests are a Poisson draw, every ready worker answers
so many a second, first come first served, and whoever cannot be answered waits. How requests of one second wait for
each other is not modelled. The policy is the real one (services/monitor/scaling.py): it is shown observations as the
monitor makes them, every few seconds, and its counts are obeyed, with the time that a new worker takes to load. No
process, no clock: a day takes some seconds.

Printed are worker-hours and the 95th percentile of the time to first token of

- the scaled fleet;
- *fixed for the peak*: as many workers as the busiest minute needs at 80 %, all day;
- *fixed, as fast*: the fewest workers whose 95th percentile over all of the day is no worse than the scaled fleet's. As
  bursts are less than 5 % of a day's requests, it may leave them waiting: see `longest_wait_s`.

Saved is the share of worker-hours against each.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from services.monitor.observations import Measured, Observation
from services.monitor.scaling import Limits, ScalingState, decide
from shared.histogram import BOUNDS
from shared.status import Status

DAY_SECONDS = 86_400
HOUR_SECONDS = 3600
LOOK_SECONDS = 15
"""Decisions look back so far, as by default, and are made as often."""
LOADING_SECONDS = 30
WORKER_RATE = 10.0
"""Requests per second that one worker answers."""
ANSWER_SECONDS = 0.1
"""From a worker's start on a request to its first token."""
NIGHT_SHARE = 0.12
"""Of the day's peak."""
PEAK_HOUR = 14.0
BURSTS = 6
BURST_SECONDS = 300, 1200
BURST_FACTOR = 1.3, 1.6
NOISE = 0.05
UP_AT = 0.8
Load = npt.NDArray[np.float64]
"""[seconds]: expected requests of each second."""


def day(seed: int, peak: float, seconds: int = DAY_SECONDS) -> Load:
    """Requests per second, expected: a daily cycle, slow noise, and bursts.

    Args:
        seed: of the noise and the bursts.
        peak: requests per second of the cycle's top, without bursts.
        seconds: of the day's beginning.

    """
    draw = np.random.default_rng(seed)
    hours = np.arange(DAY_SECONDS) / HOUR_SECONDS
    cycle = 0.5 + 0.5 * np.cos((hours - PEAK_HOUR) * 2 * math.pi / 24)
    load = peak * (NIGHT_SHARE + (1 - NIGHT_SHARE) * cycle**1.5)
    minutes = np.exp(NOISE * draw.standard_normal(DAY_SECONDS // 60))
    load *= np.repeat(minutes, 60)
    for start in draw.integers(0, DAY_SECONDS, BURSTS):
        length, factor = int(draw.integers(*BURST_SECONDS)), draw.uniform(*BURST_FACTOR)
        load[start : start + length] *= factor
    return load[:seconds]


@dataclass(frozen=True)
class Run:
    """What came of a day."""

    worker_hours: float
    p95_seconds: float
    """Of the time to first token."""
    most: int
    changes: int = 0
    requests: int = 0
    longest_wait: float = 0.0


class Line:
    """Requests before `workers`, a second at a time, first come first served."""

    def __init__(self) -> None:
        self.waiting = 0.0
        self.waits: list[tuple[float, int]] = []
        """(seconds to the first token, so many requests) of each second."""
        self.busy = 0.0
        """Share of the workers' time in the last second."""

    def second(self, arrivals: int, workers: int) -> None:
        rate = max(workers, 1) * WORKER_RATE
        if arrivals:  # those of this second come behind all that wait, half of their own before them
            ahead = self.waiting + max(0.0, arrivals - rate) / 2
            self.waits.append((ANSWER_SECONDS + ahead / rate, arrivals))
        there = self.waiting + arrivals
        answered = min(there, rate)
        self.waiting = there - answered
        self.busy = answered / rate


def percentile(waits: Sequence[tuple[float, int]], q: float) -> float:
    """The q-quantile of weighted waits."""
    ordered = sorted(waits)
    rank, seen = q * sum(count for _, count in ordered), 0
    for seconds, count in ordered:
        seen += count
        if seen >= rank:
            return seconds
    return 0.0


def draws(load: Load, seed: int) -> list[int]:
    """The requests of each second; the same for every fleet."""
    return [int(n) for n in np.random.default_rng(seed + 1).poisson(load)]


def fixed(arrivals: Sequence[int], workers: int) -> Run:
    """A fleet that stays as it is."""
    line = Line()
    for count in arrivals:
        line.second(count, workers)
    hours = workers * len(arrivals) / HOUR_SECONDS
    return Run(hours, percentile(line.waits, 0.95), workers, 0, sum(arrivals), max(line.waits)[0])


def scaled(arrivals: Sequence[int], limits: Limits) -> Run:
    """A fleet that the policy scales."""
    line, state, started = Line(), ScalingState(since=-1e6), [-1e6] * limits.least
    busy, seconds, most, changes = [0.0] * LOOK_SECONDS, 0, limits.least, 0
    for now, count in enumerate(arrivals):
        ready = sum(now - at >= LOADING_SECONDS for at in started)
        line.second(count, ready)
        busy[now % LOOK_SECONDS] = line.busy
        seconds += len(started)
        if now % LOOK_SECONDS == LOOK_SECONDS - 1:
            seen = _observation(now, started, sum(busy) / len(busy), line)
            decision, state = decide("expert", seen, state, limits)
            changes += decision.desired != len(started)
            started = started[: decision.desired] + [float(now)] * (decision.desired - len(started))
            most = max(most, len(started))
    return Run(seconds / HOUR_SECONDS, percentile(line.waits, 0.95), most, changes, sum(arrivals), max(line.waits)[0])


def _observation(now: int, started: Sequence[float], busy: float, line: Line) -> Observation:
    """What the monitor would see: workers, a router with the line before them, and the gateway's latencies."""
    workers = []
    for number, at in enumerate(started):
        loading = now - at < LOADING_SECONDS
        status = Status(
            service="expert",
            instance=f"expert-{number:03}",
            state="loading" if loading else "ready",
            started=max(0.0, at),
            cores=1.0,
            memory_bytes=2,
            loaded_bytes=0,
            memory_limit_bytes=10**9,
            memory_available_bytes=10**9,
        )
        workers.append(Measured(status, 0.5, 0.0 if loading else LOOK_SECONDS, busy=busy * LOOK_SECONDS))
    router = Status(service="router", instance="router", state="ready", cores=1.0, waiting=int(line.waiting))
    gateway = Status(service="gateway", instance="gateway", state="ready")
    latencies = {"time_to_first_token": _histogram(line.waits[-LOOK_SECONDS:])}
    others = [
        Measured(gateway, 0.5, LOOK_SECONDS, latencies=latencies),
        Measured(router, 0.5, LOOK_SECONDS, cpu=0.0, tokens=int(1000 * busy * len(started))),
    ]
    return Observation(float(now), LOOK_SECONDS, (*workers, *others))


def _histogram(waits: Sequence[tuple[float, int]]) -> tuple[int, ...]:
    counts = [0] * (len(BOUNDS) + 1)
    for seconds, count in waits:
        counts[int(np.searchsorted(BOUNDS, seconds))] += count
    return tuple(counts)


def as_fast(arrivals: Sequence[int], p95: float, most: int) -> Run:
    """The smallest fixed fleet whose 95th percentile is no worse than `p95`, by halving; `most` is enough for it."""
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        if fixed(arrivals, middle).p95_seconds <= p95:
            high = middle
        else:
            low = middle + 1
    return fixed(arrivals, low)


def replay(seed: int, peak: float, limits: Limits) -> dict[str, Any]:
    """The three fleets on the same day."""
    load = day(seed, peak)
    arrivals = draws(load, seed)
    busiest_minute = float(np.asarray(arrivals).reshape(-1, 60).mean(axis=1).max())
    for_peak = fixed(arrivals, math.ceil(busiest_minute / WORKER_RATE / UP_AT))
    auto = scaled(arrivals, limits)
    fast = as_fast(arrivals, auto.p95_seconds, 4 * for_peak.most)

    def saved(other: Run) -> float:
        return round(1 - auto.worker_hours / other.worker_hours, 4)

    def shown(run: Run) -> dict[str, Any]:
        return {
            "worker_hours": round(run.worker_hours, 1),
            "p95_ms": round(1000 * run.p95_seconds, 1),
            "longest_wait_s": round(run.longest_wait, 1),
            "most_workers": run.most,
            "changes": run.changes,
        }

    return {
        "seed": seed,
        "requests": auto.requests,
        "scaled": shown(auto),
        "fixed_for_the_peak": {**shown(for_peak), "saved": saved(for_peak)},
        "fixed_as_fast": {**shown(fast), "saved": saved(fast)},
    }


LIMITS = replace(Limits(), most=32)
"""The defaults, with room for the bursts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--peak", type=float, default=100.0, help="requests per second of the cycle's top")
    arguments = parser.parse_args()
    print(json.dumps(replay(arguments.seed, arguments.peak, LIMITS), indent=2))


if __name__ == "__main__":
    main()
