"""Figures of a run, and when it passes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.chaos import ChaosPlan, Outcome
from services.chaos_fleet import Struck
from services.chaos_load import Asked
from services.chaos_report import longest_waits, markdown, notes, quantiles, report, tables, tokens_per_second
from services.chaos_schedule import Strike
from shared.errors import StartError


def struck(at: float, ready: float | None = None) -> Struck:
    return Struck(Strike(0, at, "router", 0, "kill"), "router-5", 0, at, 0.0, None, ready)


def test_tokens_count_where_their_events_came() -> None:
    asked = [Asked(0, 0.0, 12.0, [1.0, 2.0, 11.0, 12.0], tokens=8)]
    assert tokens_per_second(asked, (0.0, 10.0)) == pytest.approx(0.4)
    assert tokens_per_second(asked, (0.0, 20.0)) == pytest.approx(0.4)
    assert tokens_per_second([Asked(0, 0.0, 1.0)], (0.0, 1.0)) == 0


def test_quantiles_are_values_that_were_measured() -> None:
    assert quantiles([float(n) for n in range(1, 101)]) == {"p50": 50.0, "p95": 95.0, "max": 100.0}
    assert quantiles([3.0]) == {"p50": 3.0, "p95": 3.0, "max": 3.0}
    assert quantiles([]) == {"p50": None, "p95": None, "max": None}


def test_a_wait_belongs_to_the_strikes_that_it_lasts_over() -> None:
    strikes = [struck(10.0), struck(20.0), struck(30.0)]
    asked = [Asked(0, 1.0, 34.0, [2.0, 9.5, 12.0, 12.5, 25.0, 34.0])]
    assert longest_waits(asked, strikes, 40.0) == [12.5, 12.5, 9.0]
    assert longest_waits([Asked(0, 1.0, 2.0, [2.0])], strikes, 40.0) == [0.0, 0.0, 0.0]
    assert longest_waits(asked, [], 40.0) == []


def outcome(**fields: object) -> Outcome:
    good = Asked(0, 101.0, 103.0, [102.0, 103.0], tokens=2)
    given = {
        "asked": [good],
        "baseline": [good],
        "names": ["greedy 0"],
        "window": (100.0, 110.0),
        "baseline_window": (100.0, 105.0),
        "struck": [struck(102.0, 104.5)],
    }
    return Outcome(ChaosPlan(Path("models/demo")), **{**given, **fields})  # type: ignore[arg-type]


def test_a_run_without_failures_passes() -> None:
    found = report(outcome())
    assert found["reasons"] == []
    assert found["throughput_lost"] == 0.5
    assert found["recovery"][0]["recovery"]["max"] == 2.5
    assert json.loads(json.dumps(found)) == found
    assert len(tables(found)) == 2
    assert "| router, SIGKILL | 1 |" in markdown(found)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"asked": [Asked(0, 101.0, 103.0, failure="HTTP 503: x")]}, "1 requests failed, disturbed"),
        ({"asked": [Asked(0, 101.0, 103.0, [102.0], wrong="missing tokens")]}, "1 answers were wrong, disturbed"),
        ({"baseline": [Asked(0, 101.0, 103.0, [102.0], wrong="other")]}, "1 answers were wrong, undisturbed"),
        ({"asked": []}, "no request came back"),
        ({"left_out": [Strike(0, 1.0, "router", 0, "kill")]}, "1 strikes were left out"),
        ({"unwell": ["router-5"]}, "router-5 did not recover"),
        ({"leaks": ["router-5: 1 running"]}, "left behind: router-5: 1 running"),
    ],
)
def test_a_run_with_any_loss_does_not_pass(fields: dict[str, object], why: str) -> None:
    found = report(outcome(**fields))
    assert len(found["reasons"]) == 1
    assert why in found["reasons"][0]
    assert any(why in line for line in notes(found))


def test_a_plan_that_could_prove_nothing_is_refused() -> None:
    ChaosPlan(Path("x")).check()
    with pytest.raises(StartError, match="--experts 4"):
        ChaosPlan(Path("x"), experts=3).check()
    with pytest.raises(StartError, match="--routers 2"):
        ChaosPlan(Path("x"), routers=1).check()
    ChaosPlan(Path("x"), routers=1, experts=1, targets=("nats",)).check()
