"""Tries beside the first: a share of the calls, whatever their order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shared.retry_budget import RetryBudget


def test_a_fifth_of_the_calls_may_be_sent_again() -> None:
    budget = RetryBudget(0.2)
    assert not budget.take(0.0)
    budget.called(5)
    assert budget.take(0.0)
    assert not budget.take(0.0)
    assert (budget.calls, budget.taken, budget.refused) == (5, 1, 2)


def test_who_calls_seldom_has_a_reserve_that_comes_back_with_time() -> None:
    budget = RetryBudget(0.2, saved=2, reserve_per_second=2)
    assert [budget.take(0.0) for _ in range(3)] == [True, True, False]
    assert [budget.take(1.0) for _ in range(3)] == [True, True, False]


def test_a_clock_that_goes_back_earns_nothing() -> None:
    budget = RetryBudget(0.2, saved=1, reserve_per_second=1)
    assert budget.take(10.0)
    assert not budget.take(5.0)


@given(st.lists(st.one_of(st.integers(1, 50), st.floats(0, 0.5)), max_size=200))
def test_never_more_than_the_share_and_the_reserve(events: list[int | float]) -> None:
    budget, now = RetryBudget(0.2, saved=10, reserve_per_second=10), 0.0
    for event in events:
        if isinstance(event, int):
            budget.called(event)
        else:
            now += event
            while budget.take(now):
                pass
        assert budget.taken <= 0.2 * budget.calls + 10 * (now + 1) + 1e-6
