"""What bench.failover makes of its turns."""

from __future__ import annotations

import pytest

from bench.failover import SETTLE_SECONDS, Window, kills, of_expected, summary


def test_capacity_explains_what_is_lost_while_one_replica_is_down() -> None:
    assert of_expected(100, 200, Window(175, 0.75)) == pytest.approx(1)
    assert of_expected(100, 200, Window(100, 0.0)) == pytest.approx(1)
    assert of_expected(100, 200, Window(190, 1.0)) == pytest.approx(0.95)


def test_replicas_are_killed_in_turns() -> None:
    found = kills(40, 10)
    assert [(k.at - SETTLE_SECONDS, k.index, k.action) for k in found] == [
        (0, 0, "kill"),
        (10, 1, "kill"),
        (20, 0, "kill"),
        (30, 1, "kill"),
    ]


def test_the_summary_takes_each_rounds_own_ratio() -> None:
    rounds = [
        {
            "one": Window(100, 0),
            "two": Window(200, 1),
            "starting": Window(160, 1),
            "killed": Window(150, 0.5, waits=(0.5, 2)),
        },
        {
            "one": Window(50, 0),
            "two": Window(100, 1),
            "starting": Window(80, 1),
            "killed": Window(60, 0.5, failed=1, wrong=2),
        },
        {"one": Window(100, 0), "two": Window(200, 1), "starting": Window(160, 1), "killed": Window(135, 0.5)},
    ]
    found = summary(rounds)
    assert (found["of_expected"], found["of_expected_least"], found["of_expected_greatest"]) == (0.9, 0.8, 1.0)
    assert (found["failed"], found["wrong"], found["two_ready"]) == (1, 2, 0.5)
    assert found["tokens_per_second"] == {"one": 100, "two": 200, "starting": 160, "killed": 135}
    assert (found["of_expected_while_starting"], found["wait_after_kill"]) == (1.125, [1.25, 2])
