"""From samples to figures: pure functions over what was measured. All times are seconds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from services.benchmark_requests import Sample

CURVE_POINTS = 100
BUCKETS = 60
Mode = Literal["closed", "open"]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Distribution:
    """Of one kind of time. Quantiles by nearest rank: each is a time that was measured."""

    count: int
    mean: float
    p50: float
    p95: float
    p99: float
    max: float
    curve: list[float]
    """The quantiles 0, 0.01, …, 1."""


@dataclass(frozen=True)
class Bucket:
    """A stretch of a row's time, and the inter-token latencies that ended in it; None: there were none."""

    at: float
    """The stretch's middle, from the row's start."""
    tokens_per_second: float
    p50: float | None
    p99: float | None
    max: float | None


@dataclass(frozen=True)
class Row:
    """One load and what came of it."""

    mode: Mode
    load: float
    """Closed: streams at once. Open: requests per second that were due."""
    seconds: float
    """The window that the rates are of."""
    done: int
    failed: int
    failures: dict[str, int]
    """How many failed for each reason, the most frequent first."""
    examples: dict[str, str]
    """For each reason: what the server said the first time."""
    requests_per_second: float
    output_tokens_per_second: float
    input_tokens_per_second: float
    input_tokens: float
    """Mean of a request, as the server counts."""
    output_tokens: float
    tokens_per_event: float
    """Above 1, several tokens came together, and the inter-token latency is that between two such groups."""
    time_to_first_token: Distribution | None
    inter_token_latency: Distribution | None
    latency: Distribution | None
    """To the end of the answer."""
    send_lag: Distribution | None
    """How late the generator was to send. Much of it, and the generator is what was measured."""
    generator_cpu: float
    """Share of one core that the generator took."""
    over_time: list[Bucket]

    @property
    def name(self) -> str:
        if self.mode == "open":
            return f"{self.load:g} req/s"
        return f"{self.load:g} stream{'' if self.load == 1 else 's'}"


def quantile(values: Sequence[float] | Floats, q: float) -> float:
    """By nearest rank; NaN of nothing."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    return float(ordered[max(0, math.ceil(q * len(ordered)) - 1)]) if len(ordered) else math.nan


def distribution(values: Sequence[float] | Floats) -> Distribution | None:
    """None of nothing."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    if not len(ordered):
        return None
    last = len(ordered) - 1

    def at(q: float) -> float:
        return float(ordered[min(last, max(0, math.ceil(q * len(ordered)) - 1))])

    curve = [at(step / CURVE_POINTS) for step in range(CURVE_POINTS + 1)]
    return Distribution(len(ordered), float(ordered.mean()), at(0.5), at(0.95), at(0.99), float(ordered[-1]), curve)


def over_time(ends: Floats, gaps: Floats, start: float, seconds: float, tokens_per_event: float) -> list[Bucket]:
    """Inter-token latency along the row.

    Args:
        ends: when each gap ended [N].
        gaps: the gaps [N].
        start: of the row.
        seconds: its length.
        tokens_per_event: how many tokens came with each.

    """
    if not len(ends) or seconds <= 0:
        return []
    width = seconds / BUCKETS
    number = np.clip(((ends - start) / width).astype(np.int64), 0, BUCKETS - 1)
    buckets = []
    for index in range(BUCKETS):
        inside = gaps[number == index]
        d = distribution(inside)
        rate = len(inside) * tokens_per_event / width
        times = (d.p50, d.p99, d.max) if d else (None, None, None)
        buckets.append(Bucket((index + 0.5) * width, rate, *times))
    return buckets


def row(
    mode: Mode,
    load: float,
    samples: list[Sample],
    start: float,
    seconds: float,
    *,
    generator_cpu: float = 0.0,
    also_failed: Counter[str] | None = None,
) -> Row:
    """The figures of one load.

    Rates count what arrived in the window [start, start + seconds]: tokens one by one, requests by their end, a prompt
    by its first token. Latencies are those of all requests that came back whole, also after the window, as slow ones
    would be missing otherwise; inter-token latencies are those of the window, when the whole load was on.

    Args:
        mode: closed or open loop.
        load: streams, or requests per second.
        samples: every request that was sent and not broken off by us.
        start: the window's start, in `time.perf_counter`.
        seconds: its length.
        generator_cpu: share of a core.
        also_failed: requests that were due and could not be sent, by reason.

    """
    end = start + seconds
    whole = [s for s in samples if s.failure is None]
    events = sum(len(s.events) for s in whole)
    tokens = sum(s.output_tokens for s in whole)
    per_event = tokens / events if events else 1.0
    streams = [np.frombuffer(s.events, dtype=np.float64) for s in samples if len(s.events)]
    arrived = np.concatenate(streams) if streams else np.empty(0)
    gaps = np.concatenate([np.diff(times) for times in streams]) if streams else np.empty(0)
    ends = np.concatenate([times[1:] for times in streams]) if streams else np.empty(0)
    inside = ends <= end
    gaps, ends = gaps[inside], ends[inside]
    at_once = sum(s.output_tokens for s in whole if not len(s.events) and s.ended <= end)  # answers that came as one
    read = sum(s.input_tokens for s in whole if (s.events[0] if len(s.events) else s.ended) <= end)
    failures = Counter(s.failure for s in samples if s.failure is not None) + (also_failed or Counter())
    examples: dict[str, str] = {}
    for s in samples:
        if s.failure is not None and s.detail:
            examples.setdefault(s.failure, s.detail)
    seconds_or_one = seconds or 1.0
    return Row(
        mode=mode,
        load=load,
        seconds=seconds,
        done=len(whole),
        failed=failures.total(),
        failures=dict(failures.most_common()),
        examples=examples,
        requests_per_second=sum(s.ended <= end for s in whole) / seconds_or_one,
        output_tokens_per_second=(np.count_nonzero(arrived <= end) * per_event + at_once) / seconds_or_one,
        input_tokens_per_second=read / seconds_or_one,
        input_tokens=sum(s.input_tokens for s in whole) / max(1, len(whole)),
        output_tokens=tokens / max(1, len(whole)),
        tokens_per_event=per_event,
        time_to_first_token=distribution([s.events[0] - s.due for s in whole if len(s.events)]),
        inter_token_latency=distribution(gaps),
        latency=distribution([s.ended - s.due for s in whole]),
        send_lag=distribution([s.sent - s.due for s in samples]),
        generator_cpu=generator_cpu,
        over_time=over_time(ends, gaps, start, seconds, per_event),
    )
