"""Figures from samples made by hand."""

from __future__ import annotations

import math
from array import array
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.benchmark_figures import BUCKETS, distribution, quantile, row
from services.benchmark_requests import Sample


def sample(
    due: float, *events: float, ended: float | None = None, failure: str | None = None, late: float = 0
) -> Sample:
    end = ended if ended is not None else events[-1]
    return Sample(due, due + late, end, array("d", events), 10, len(events), failure, "said" if failure else "")


def test_quantiles_are_of_the_nearest_rank() -> None:
    values = [0.4, 0.1, 0.3, 0.2]
    assert [quantile(values, q) for q in (0.25, 0.5, 0.75, 0.99)] == [0.1, 0.2, 0.3, 0.4]
    assert math.isnan(quantile([], 0.5))
    assert distribution([]) is None


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300))
def test_a_distribution_has_only_values_that_were_measured_and_they_ascend(values: list[float]) -> None:
    d = distribution(values)
    assert d is not None
    assert {*d.curve, d.p50, d.p95, d.p99, d.max} <= set(values)
    assert d.curve == sorted(d.curve)
    assert (d.curve[0], d.curve[50], d.curve[-1]) == (min(values), d.p50, max(values))
    assert d.p50 == quantile(values, 0.5)


def test_latency_counts_from_when_it_was_due() -> None:
    came = row("open", 2, [sample(100, 103, 104, late=2.5)], 100, 10)
    assert came.time_to_first_token is not None
    assert came.latency is not None
    assert came.send_lag is not None
    assert (came.time_to_first_token.p50, came.latency.p50, came.send_lag.max) == (3, 4, 2.5)


def test_rates_are_those_of_the_window() -> None:
    samples = [sample(100, 101, 102, 103), sample(103, 104, 109, 112)]  # the last token comes after the window
    came = row("closed", 1, samples, 100, 10)
    assert came.done == 2
    assert (came.requests_per_second, came.output_tokens_per_second, came.input_tokens_per_second) == (0.1, 0.5, 2)
    assert came.inter_token_latency is not None
    assert (came.inter_token_latency.count, came.inter_token_latency.max) == (3, 5)
    assert came.latency is not None
    assert came.latency.max == 9, "the slow request counts, though it ended after the window"


def test_failures_are_counted_by_reason_and_leave_the_latencies_alone() -> None:
    samples = [
        sample(0, 1, 2),
        *(sample(0, ended=9, failure="HTTP 429: overloaded") for _ in range(2)),
        sample(0, 1, ended=5, failure="cut"),
    ]
    came = row("closed", 4, samples, 0, 10, also_failed=Counter({"not sent": 3}))
    assert (came.done, came.failed) == (1, 6)
    assert came.failures == {"not sent": 3, "HTTP 429: overloaded": 2, "cut": 1}
    assert came.examples == {"HTTP 429: overloaded": "said", "cut": "said"}
    assert came.latency is not None
    assert (came.latency.count, came.latency.max) == (1, 2)


def test_nothing_that_came_back_gives_no_figures_and_no_error() -> None:
    came = row("open", 1, [], 0, 5)
    assert (came.done, came.failed, came.latency, came.output_tokens_per_second, came.over_time) == (0, 0, None, 0, [])


def test_several_tokens_in_one_event_are_counted() -> None:
    one = sample(0, 1, 2)
    one.output_tokens = 6
    came = row("closed", 1, [one], 0, 10)
    assert came.tokens_per_event == 3
    assert came.output_tokens_per_second == pytest.approx(0.6)


def test_over_time_has_each_gap_where_it_ended() -> None:
    came = row("closed", 1, [sample(0, 1, 2, 6, 60)], 0, 60)
    filled = {bucket.at: bucket.max for bucket in came.over_time if bucket.max is not None}
    assert len(came.over_time) == BUCKETS
    assert filled == {2.5: 1, 6.5: 4, 59.5: 54}
    assert sum(b.tokens_per_second for b in came.over_time) * 60 / BUCKETS == pytest.approx(3)


@pytest.mark.parametrize(
    ("mode", "load", "name"), [("closed", 1, "1 stream"), ("closed", 16, "16 streams"), ("open", 2.5, "2.5 req/s")]
)
def test_names(mode: str, load: float, name: str) -> None:
    assert row(mode, load, [], 0, 1).name == name  # type: ignore[arg-type]
