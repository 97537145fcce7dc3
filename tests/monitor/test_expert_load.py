"""The moving average of tokens per expert, over routers that come, go and start anew."""

from __future__ import annotations

import pytest

from services.monitor.expert_load import ExpertLoad
from shared.status import Status


def router(instance: str, *rows: tuple[int, ...], started: float = 1.0) -> Status:
    return Status(service="router", instance=instance, started=started, expert_tokens=rows)


def test_what_routers_send_adds_up() -> None:
    load = ExpertLoad(1e9)
    load.observe([router("a", (0, 0), (0, 0)), router("b", (5, 0), (0, 0))], 0.0)
    load.observe([router("a", (3, 1), (0, 4)), router("b", (6, 0), (1, 0))], 1.0)
    assert load.tokens.tolist() == [pytest.approx([4, 1]), pytest.approx([1, 4])]


def test_half_is_forgotten_in_each_half_life() -> None:
    load = ExpertLoad(10.0)
    load.observe([router("a", (0, 0))], 0.0)
    load.observe([router("a", (800, 80))], 0.0)
    load.observe([router("a", (800, 80))], 10.0)
    assert load.tokens[0].tolist() == pytest.approx([400, 40])
    load.observe([router("a", (900, 80))], 30.0)
    assert load.tokens[0].tolist() == pytest.approx([200, 10])


def test_what_was_counted_before_we_looked_is_not_of_now() -> None:
    load = ExpertLoad(1e9)
    load.observe([router("a", (10**6, 0))], 0.0)
    assert not load.tokens.any()


def test_a_router_that_starts_anew_counts_from_there() -> None:
    load = ExpertLoad(1e9)
    load.observe([router("a", (100, 0))], 0.0)
    load.observe([router("a", (30, 0), started=2.0)], 1.0)
    load.observe([router("a", (31, 1), started=2.0)], 2.0)
    assert load.tokens[0].tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("rows", [(), ((),), ((1, 2), (3,))], ids=["none", "no experts", "ragged"])
def test_reports_that_say_nothing_change_nothing(rows: tuple[tuple[int, ...], ...]) -> None:
    load = ExpertLoad(1e9)
    load.observe([router("a", (0, 0))], 0.0)
    load.observe([router("a", (7, 0)), router("b", *rows)], 1.0)
    assert load.tokens[0].tolist() == pytest.approx([7, 0])


def test_before_anything_was_heard_there_is_nothing() -> None:
    assert ExpertLoad(1.0).tokens.size == 0
