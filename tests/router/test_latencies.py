"""When a call is slow, and when it has stalled: by calls of its own size."""

from __future__ import annotations

from services.router.latencies import (
    LEAST_HEDGE_SECONDS,
    LEAST_STALL_SECONDS,
    MOST_STALL_SECONDS,
    STALL_FACTOR,
    UNKNOWN_STALL_SECONDS,
    WINDOW,
    Latencies,
)


def observed(size: int, *seconds: float) -> Latencies:
    latencies = Latencies()
    for each in seconds:
        latencies.add(size, each)
    return latencies


def test_nothing_is_hedged_before_enough_is_known() -> None:
    latencies = observed(3, *[1.0] * 15)
    assert latencies.hedge_after(3) is None
    assert latencies.stalled_after(3) == UNKNOWN_STALL_SECONDS
    latencies.add(3, 1.0)
    assert latencies.hedge_after(3) == 1.0
    assert latencies.stalled_after(3) == 1.0 + MOST_STALL_SECONDS


def test_one_in_twenty_is_slow() -> None:
    latencies = observed(1, *[0.001 * n for n in range(1, 129)])
    slow = latencies.hedge_after(1)
    assert slow is not None
    assert sum(0.001 * n > slow for n in range(1, 129)) == 6  # of 128
    assert observed(1, *[0.2] * WINDOW).stalled_after(1) == STALL_FACTOR * 0.2


def test_short_calls_have_a_floor() -> None:
    latencies = observed(1, *[0.0001] * WINDOW)
    assert latencies.hedge_after(1) == LEAST_HEDGE_SECONDS
    assert latencies.stalled_after(1) == LEAST_STALL_SECONDS


def test_what_was_long_ago_is_forgotten() -> None:
    latencies = observed(1, *[1.5] * WINDOW, *[0.1] * WINDOW)
    assert latencies.hedge_after(1) == 0.1


def test_an_outage_does_not_teach_that_calls_are_slow() -> None:
    latencies = observed(1, *[0.2] * WINDOW, *[30.0] * 16)
    assert latencies.stalled_after(1) <= STALL_FACTOR * 0.2 + MOST_STALL_SECONDS
    assert observed(1, *[30.0] * 16).stalled_after(1) <= UNKNOWN_STALL_SECONDS + MOST_STALL_SECONDS


def test_sizes_know_nothing_of_one_another() -> None:
    latencies = observed(4, *[0.5] * WINDOW)
    assert latencies.hedge_after(6) is None
    assert latencies.stalled_after(6) == UNKNOWN_STALL_SECONDS


def test_a_worker_that_dies_is_noticed_soon_though_calls_are_long() -> None:
    latencies = observed(9, *[1.9] * WINDOW)
    assert latencies.stalled_after(9) == 1.9 + MOST_STALL_SECONDS


def test_sizes_are_powers_of_two_of_rows() -> None:
    assert [Latencies.size(rows) for rows in (1, 2, 3, 4, 255, 256)] == [1, 2, 2, 3, 8, 9]
    assert Latencies.size(2**60) == 31
