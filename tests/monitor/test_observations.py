"""Reports made into figures."""

from __future__ import annotations

import pytest

from services.monitor.observations import FORGOTTEN_SECONDS, History, Observation
from services.monitor.sight import leader
from shared.histogram import Histogram
from shared.status import Status


def report(instance: str = "router-1", **fields: object) -> Status:
    return Status(service=instance.split("-", maxsplit=1)[0], instance=instance, started=1.0, state="ready", **fields)  # type: ignore[arg-type]


def look(history: History, at: float, window: float | None = None) -> Observation:
    return history.observation(at, 1000.0 + at, window=window)


def test_counters_become_what_was_done_in_the_window() -> None:
    history = History(60)
    for second in range(11):
        history.observe(
            report(tokens_total=100 * second, cpu=0.5, errors={"internal_error": second}, expert_tokens=((second, 0),)),
            float(second),
        )
    (measured,) = look(history, 10.0, window=5.0).instances
    assert (measured.seconds, measured.tokens, measured.cpu) == (5.0, 500, 0.5)
    assert measured.failures == {"internal_error": 5}
    assert measured.expert_tokens == ((5, 0),)


def test_one_report_alone_says_nothing_about_rates() -> None:
    history = History(60)
    history.observe(report(tokens_total=100), 0.0)
    (measured,) = look(history, 1.0).instances
    assert (measured.seconds, measured.tokens, measured.latencies) == (0.0, 0, {})


def test_a_process_that_started_again_counts_anew() -> None:
    history = History(60)
    history.observe(report(tokens_total=1000), 0.0)
    history.observe(Status(service="router", instance="router-1", started=2.0, tokens_total=3), 1.0)
    history.observe(Status(service="router", instance="router-1", started=2.0, tokens_total=10), 2.0)
    (measured,) = look(history, 2.0).instances
    assert measured.tokens == 7


def test_silence_is_a_state_of_its_own() -> None:
    history = History(600)
    history.observe(report("router-1"), 0.0)
    history.observe(report("router-2"), 9.0)
    seen = look(history, 10.0)
    assert [m.instance for m in seen.ready("router")] == ["router-2"]
    assert [m.instance for m in seen.stale("router")] == ["router-1"]
    assert look(history, FORGOTTEN_SECONDS + 1.0).of("router", fresh=False)[0].instance == "router-2"


def test_percentiles_are_of_all_instances_together() -> None:
    history, slow, fast = History(60), Histogram(), Histogram()
    for at in (0.0, 1.0):
        history.observe(report("gateway-1", latencies={"end_to_end": fast.counts()}), at)
        history.observe(report("gateway-2", latencies={"end_to_end": slow.counts()}), at)
        for _ in range(90):
            fast.observe(0.01)
        for _ in range(10):
            slow.observe(2.0)
    seen = look(history, 1.0)
    assert seen.quantile("gateway", "end_to_end", 0.5) == pytest.approx(0.01, rel=0.25)
    assert seen.quantile("gateway", "end_to_end", 0.95) == pytest.approx(2.0, rel=0.25)
    assert seen.quantile("gateway", "inter_token", 0.95) is None


def test_of_several_monitors_the_oldest_that_is_ready_acts() -> None:
    history = History(60)
    for name, started, state in (
        ("monitor-b", 5.0, "ready"),
        ("monitor-a", 9.0, "ready"),
        ("monitor-c", 1.0, "draining"),
    ):
        history.observe(Status(service="monitor", instance=name, started=started, state=state), 0.0)  # type: ignore[arg-type]
    assert leader(look(history, 1.0)) == "monitor-b"
    assert leader(look(history, 10.0)) is None  # nobody was heard of: nobody acts
