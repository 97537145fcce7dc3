"""The last hour, in points."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from services.monitor.observations import History, Observation
from services.monitor.timeline import HOUR_SECONDS, STEP_SECONDS, Point, Timeline, point
from tests.monitor.test_report import counts, observed, status, still

NOW = 1_767_225_600.0


def filled(times: list[float]) -> Timeline:
    timeline = Timeline()
    for at in times:
        timeline.add(Point(NOW + at), at)
    return timeline


def test_a_point_has_what_was_measured_in_its_step() -> None:
    after = status(
        "gateway-1",
        tokens_total=400,
        requests_total=20,
        errors={"internal_error": 10, "invalid_request": 99},
        latencies={"time_to_first_token": counts(0.1, 10)},
        running=3,
        waiting=2,
    )
    made = point(observed((status("gateway-1"), after), still("expert-1"), still("expert-2", state="loading")))
    assert (made.tokens_per_second, made.requests_per_second, made.failures_per_second) == (40.0, 2.0, 1.0)
    assert (made.running, made.waiting, made.ready_experts, made.ready_routers) == (3, 2, 1, 0)
    assert made.first_token_p95_ms is not None
    assert made.inter_token_p95_ms is None


def test_without_a_connection_and_without_anybody_a_point_knows_nothing() -> None:
    nobody = point(History(60).observation(0.0, NOW))
    assert nobody == Point(NOW)
    cut_off: Observation = observed(still("gateway-1"), still("expert-1"), connected=False)
    assert point(cut_off) == Point(cut_off.now)


def test_a_gateway_that_nobody_asks_sends_zero_tokens_which_is_not_unknown() -> None:
    made = point(observed(still("gateway-1")))
    assert (made.tokens_per_second, made.failures_per_second, made.waiting) == (0.0, 0.0, 0)
    assert made.first_token_p95_ms is None


def test_an_hour_of_points_and_no_more_is_kept() -> None:
    timeline = filled([STEP_SECONDS * n for n in range(1000)])
    now = NOW + STEP_SECONDS * 999
    points = timeline.points(now)
    assert len(points) == HOUR_SECONDS / STEP_SECONDS
    assert points[-1].time == now
    assert timeline.points(now + 2 * HOUR_SECONDS) == []


def test_time_without_points_stays_a_gap() -> None:
    times = [p.time - NOW for p in filled([0.0, 10.0, 500.0, 510.0]).points(NOW + 510.0)]
    assert times == [0.0, 10.0, 500.0, 510.0]


def test_late_ticks_do_not_add_up() -> None:
    timeline = filled([1.04 * n for n in range(1000)])
    assert len(timeline.points(NOW + 1040)) == 104


@given(st.lists(st.floats(0, 30), max_size=200))
def test_there_is_never_more_than_one_point_in_a_step(pauses: list[float]) -> None:
    at, times = 0.0, []
    for pause in pauses:
        at += pause
        times.append(at)
    kept = filled(times).points(NOW + at)
    steps = [(p.time - NOW - times[0]) // STEP_SECONDS for p in kept] if kept else []
    assert len(steps) <= at / STEP_SECONDS + 1
    assert all(b > a for a, b in itertools.pairwise(steps))
