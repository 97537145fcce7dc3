"""The replay of a day: what scaling saves, and that the fleets it is compared with are what they are said to be."""

from __future__ import annotations

import pytest

from bench.scaling_day import LIMITS, UP_AT, WORKER_RATE, as_fast, day, draws, fixed, percentile, replay

PEAK = 100.0


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_day_costs_far_fewer_worker_hours_than_a_fleet_for_its_peak_at_the_same_p95(seed: int) -> None:
    found = replay(seed, PEAK, LIMITS)
    peak, scaled = found["fixed_for_the_peak"], found["scaled"]
    assert peak["saved"] >= 0.375, found
    assert scaled["p95_ms"] <= 1.05 * peak["p95_ms"], found
    assert scaled["changes"] < 40, found  # a day's hills and bursts, and no flapping


def test_a_day_is_the_same_each_time_and_another_with_another_seed() -> None:
    assert (day(1, PEAK) == day(1, PEAK)).all()
    assert (day(1, PEAK) != day(2, PEAK)).any()


def test_a_fleet_that_is_too_small_is_slow_and_one_for_the_peak_is_not() -> None:
    load = day(1, PEAK, 3600)
    arrivals = draws(load, 1)
    enough = int(load.max() / WORKER_RATE / UP_AT) + 1
    assert fixed(arrivals, enough).p95_seconds < fixed(arrivals, 1).p95_seconds
    assert as_fast(arrivals, fixed(arrivals, enough).p95_seconds, enough).most <= enough


def test_a_percentile_counts_each_request() -> None:
    assert percentile([(0.1, 94), (5.0, 6)], 0.95) == 5.0
    assert percentile([(0.1, 96), (5.0, 4)], 0.95) == 0.1
