"""Latencies as counts per bucket."""

from __future__ import annotations

import random

import pytest

from shared.histogram import BOUNDS, Histogram, added, quantile, share_below, since


def test_a_quantile_is_within_a_bucket_of_the_true_one() -> None:
    rng = random.Random(1)
    values = sorted(rng.lognormvariate(-3, 1) for _ in range(10_000))
    histogram = Histogram()
    for value in values:
        histogram.observe(value)
    for q in (0.05, 0.5, 0.95, 0.99):
        assert quantile(histogram.counts(), q) == pytest.approx(values[int(q * len(values))], rel=0.25)


def test_counts_add_up_over_instances_and_apart_over_time() -> None:
    one, two = Histogram(), Histogram()
    one.observe(0.01)
    early = one.counts()
    one.observe(0.1)
    two.observe(5.0)
    assert sum(added([one.counts(), two.counts()])) == 3
    assert quantile(since(early, one.counts()), 0.5) == pytest.approx(0.1, rel=0.25)
    assert since((), early) == early
    assert since(one.counts(), early) == ()  # a count that went back is no observation


def test_nothing_observed_is_not_zero() -> None:
    assert quantile((), 0.95) is None
    assert share_below((), 1.0) is None


def test_what_is_beyond_the_last_bound_has_no_end() -> None:
    histogram = Histogram()
    histogram.observe(1e6)
    assert quantile(histogram.counts(), 0.5) == BOUNDS[-1]


def test_the_share_below_a_bound() -> None:
    histogram = Histogram()
    for seconds in (0.01, 0.01, 0.01, 2.0):
        histogram.observe(seconds)
    assert share_below(histogram.counts(), 0.5) == 0.75
    assert share_below(histogram.counts(), 100.0) == 1.0
    assert share_below(histogram.counts(), 0.0001) == pytest.approx(0.0)
