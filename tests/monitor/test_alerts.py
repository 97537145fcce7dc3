"""When alerts fire and are over, and what is said of them: the state machine against every kind of sequence."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.monitor.alerts import (
    MOST,
    State,
    Telling,
    adopted,
    fingerprint,
    group_of,
    key_of,
    open_alert,
    step,
    telling,
)
from services.monitor.messages import Event, OpenAlert
from services.monitor.rules import RULES, Reading, Verdict, judge
from tests.monitor.observing import settings

PENDING, FORGET, REPEAT = 10, 100, 40
SETTINGS = settings(
    alert_pending_seconds=PENDING,
    alert_urgent_pending_seconds=0,
    alert_forget_seconds=FORGET,
    alert_repeat_seconds=REPEAT,
)
START = 1_767_225_600
SUBJECTS = ("a", "b")
RULE = "high_latency"


def reading(verdict: Verdict, subject: str = "a", rule: str = RULE, deployment: str = "d") -> Reading:
    return Reading(rule, subject, verdict, f"{subject} is {verdict}", 0.7, 0.5, deployment)


@dataclass
class Watched:
    """A monitor's alerts, and all that it said."""

    state: State
    told: tuple[OpenAlert, ...]
    events: list[Event]
    notified: list[tuple[float, Telling]]

    @classmethod
    def new(cls) -> Watched:
        return cls({}, (), [], [])

    def look(self, now: float, readings: Iterable[Reading]) -> Telling:
        self.state, closed = step(self.state, readings, now, SETTINGS)
        said = telling(self.told, self.state, closed, now, SETTINGS.alert_repeat_seconds)
        self.told = said.told
        self.events += said.events
        self.notified.append((now, said))
        return said

    def firing(self) -> set[str]:
        return {a.reading.subject for a in self.state.values() if a.firing}

    def restarted(self, now: float) -> None:
        """Another monitor takes over, which knows what is kept and nothing else."""
        self.state = adopted({}, self.told, now)


def states(watched: Watched, subject: str = "a") -> list[str]:
    return [e.state for e in watched.events if e.subject == subject]


# -- one alert -------------------------------------------------------------------------------------------------------


def test_an_alert_fires_after_the_pending_time_and_ends_when_all_is_well() -> None:
    watched = Watched.new()
    for second in range(PENDING):
        watched.look(START + second, [reading("bad")])
        assert watched.firing() == set()
    said = watched.look(START + PENDING, [reading("bad")])
    (event,) = said.events
    assert (event.kind, event.subject, event.state, event.severity, event.action) == (
        "high_latency",
        "a",
        "firing",
        "warning",
        "scale_up",
    )
    assert (event.value, event.threshold, event.started, event.time) == (0.7, 0.5, START + PENDING, START + PENDING)
    assert event.text == "a is bad"
    assert not watched.look(START + PENDING + 1, [reading("bad")]).events
    (over,) = watched.look(START + PENDING + 2, [reading("good")]).events
    assert (over.state, over.text, over.started) == ("resolved", "a is good", START + PENDING)
    assert over.fingerprint == event.fingerprint
    assert watched.told == ()


def test_what_gets_well_before_its_time_never_fires() -> None:
    for verdict in ("good", "between"):
        watched = Watched.new()
        for second in range(4 * PENDING):
            watched.look(START + second, [reading("bad" if second % PENDING else verdict)])
        assert watched.events == []


def test_facts_fire_at_once_and_figures_do_not() -> None:
    urgent = {rule for rule, facts in RULES.items() if facts.urgent}
    assert urgent == {"service_down", "shard_without_replica"}
    for rule in RULES:
        watched = Watched.new()
        watched.look(START, [reading("bad", rule=rule)])
        assert bool(watched.firing()) == (rule in urgent)


@pytest.mark.parametrize("verdict", ["between", "unknown", "bad"])
def test_a_firing_alert_stays_until_all_is_well(verdict: Verdict) -> None:
    watched = Watched.new()
    watched.look(START, [reading("bad", rule="service_down")])
    for second in range(1, REPEAT):
        said = watched.look(START + second, [reading(verdict, rule="service_down")])
        assert (said.events, said.notifications) == ((), ())
    assert watched.firing() == {"a"}


def test_what_nobody_can_tell_does_not_count_towards_the_pending_time() -> None:
    watched = Watched.new()
    watched.look(START, [reading("bad")])
    for second in range(1, 1000):
        watched.look(START + second, [reading("unknown")])
    watched.look(START + 1000, [reading("bad")])
    assert watched.firing() == set()
    watched.look(START + 1000 + PENDING, [reading("bad")])
    assert watched.firing() == {"a"}


def test_what_has_no_reading_at_all_is_over_after_a_long_time() -> None:
    watched = Watched.new()
    watched.look(START, [reading("bad", rule="service_down")])
    watched.look(START + FORGET, [])
    assert watched.firing() == {"a"}
    (over,) = watched.look(START + FORGET + 1, []).events
    assert over.state == "resolved"
    assert "nothing was heard of it" in over.text


def test_a_pending_alert_without_a_reading_is_dropped() -> None:
    watched = Watched.new()
    watched.look(START, [reading("bad")])
    watched.look(START + 1, [])
    watched.look(START + PENDING, [reading("bad")])
    assert watched.events == []


def test_a_clock_that_is_set_back_delays_an_alert_by_no_more_than_its_pending_time() -> None:
    watched = Watched.new()
    watched.look(START, [reading("bad"), reading("bad", "b", "service_down")])
    watched.look(START - 500, [reading("bad"), reading("unknown", "b", "service_down")])
    assert watched.firing() == {"b"}
    watched.look(START - 500 + PENDING, [reading("bad")])
    assert watched.firing() == {"a", "b"}


def test_what_still_fires_is_repeated_after_the_interval_and_not_before() -> None:
    watched = Watched.new()
    told = [
        second
        for second in range(2 * REPEAT + 1)
        if watched.look(START + second, [reading("bad", rule="service_down")]).notifications
    ]
    assert told == [0, REPEAT, 2 * REPEAT]
    assert states(watched) == ["firing"], "the event stream repeats nothing"


def test_an_alert_that_was_told_is_not_over_because_the_next_monitor_knows_nothing_yet() -> None:
    watched = Watched.new()
    watched.look(START, [reading("bad", rule="service_down")])
    watched.restarted(START + 5)
    assert watched.look(START + 6, []).events == ()
    assert watched.firing() == {"a"}


def test_so_many_alerts_are_kept_and_no_more() -> None:
    state, _ = step({}, [reading("bad", f"s{n}") for n in range(MOST + 50)], START, SETTINGS)
    assert len(state) == MOST


# -- two thresholds --------------------------------------------------------------------------------------------------


def test_between_the_thresholds_is_neither_bad_nor_good() -> None:
    assert [judge(v, 0.5, 0.4) for v in (0.51, 0.5, 0.41, 0.4, 0.0)] == ["bad", "between", "between", "good", "good"]
    low = [judge(v, 0.6, 0.65, low=True) for v in (0.59, 0.6, 0.64, 0.65, 1.0)]
    assert low == ["bad", "between", "between", "good", "good"]
    assert judge(0.6, 0.6, 0.6, low=True) == "good"
    assert judge(0.5, 0.5, 0.5) == "good"


@given(st.lists(st.floats(0.401, 0.5), max_size=60), st.booleans())
def test_a_figure_that_swings_between_the_thresholds_changes_nothing(values: list[float], fires: bool) -> None:
    watched = Watched.new()
    now = START
    if fires:
        watched.look(now, [reading("bad")])
        now += PENDING
        watched.look(now, [reading("bad")])
    before = len(watched.events)
    for value in values:
        now += 1
        watched.look(now, [reading(judge(value, 0.5, 0.4))])
        assert watched.firing() == ({"a"} if fires else set())
    assert len(watched.events) == before


# -- every sequence --------------------------------------------------------------------------------------------------

Look = tuple[int, dict[str, Verdict]]
"""(seconds since the look before, verdict by subject; a subject that is left out has no reading)."""
looks = st.lists(
    st.tuples(
        st.integers(1, 7),
        st.dictionaries(st.sampled_from(SUBJECTS), st.sampled_from(get_args(Verdict)), max_size=len(SUBJECTS)),
    ),
    max_size=50,
)


def expected(history: Sequence[tuple[int, Verdict | None]]) -> bool:
    """Whether an alert fires after these (time, verdict), by the definition: slow, and with no state."""
    fires, bad_for, begun, heard = False, 0, False, 0
    for n, (now, verdict) in enumerate(history):
        passed = now - history[n - 1][0] if n else 0
        heard = now if verdict else heard
        if fires:
            fires = verdict != "good" and now - heard <= FORGET
            begun = fires
        elif verdict == "bad":
            bad_for = bad_for + passed if begun else 0
            begun = True
            fires = bad_for >= PENDING
        elif verdict != "unknown":
            begun = False
    return fires


@given(looks, st.sets(st.integers(0, 49)))
def test_any_sequence_fires_exactly_as_defined_even_across_restarts(sequence: list[Look], restarts: set[int]) -> None:
    watched = Watched.new()
    now = START
    histories: dict[str, list[tuple[int, Verdict | None]]] = defaultdict(list)
    for n, (passed, verdicts) in enumerate(sequence):
        now += passed
        if n in restarts:  # pending times begin anew
            pending = {a.reading.subject for a in watched.state.values() if not a.firing}
            for subject in pending:
                histories[subject] = []
            watched.restarted(now)
            for subject in watched.firing():  # an alert that was told counts as heard of by whoever takes over
                histories[subject].append((now, "between"))
        watched.look(now, [reading(v, subject) for subject, v in verdicts.items()])
        for subject in SUBJECTS:
            histories[subject].append((now, verdicts.get(subject)))
        assert watched.firing() == {s for s in SUBJECTS if expected(histories[s])}
        assert {each.subject for each in watched.told} == watched.firing()


@given(looks, st.sets(st.integers(0, 49)))
def test_each_firing_is_said_once_and_ends_once(sequence: list[Look], restarts: set[int]) -> None:
    watched = Watched.new()
    now = START
    for n, (passed, verdicts) in enumerate(sequence):
        now += passed
        if n in restarts:
            watched.restarted(now)
        watched.look(now, [reading(v, subject) for subject, v in verdicts.items()])
    for subject in SUBJECTS:
        said = states(watched, subject)
        assert said == ["firing", "resolved"] * (len(said) // 2) + ["firing"] * (len(said) % 2)
        assert bool(len(said) % 2) == (subject in watched.firing())


@given(looks)
def test_what_nobody_can_tell_neither_fires_nor_ends_anything(sequence: list[Look]) -> None:
    watched = Watched.new()
    now = START
    for passed, verdicts in sequence:
        now += passed
        watched.look(now, [reading(v, subject) for subject, v in verdicts.items()])
        before = watched.firing()
        now += 1
        said = watched.look(now, [reading("unknown", subject) for subject in SUBJECTS])
        assert (watched.firing(), said.events) == (before, ())


@given(looks)
def test_a_group_is_told_when_it_changes_and_then_not_before_the_repeat_interval(sequence: list[Look]) -> None:
    watched = Watched.new()
    now, last = START, 0
    for passed, verdicts in sequence:
        now += passed
        said = watched.look(now, [reading(v, subject) for subject, v in verdicts.items()])
        assert len(said.notifications) <= 1, "both subjects are of one group"
        due = bool(said.events) or (bool(watched.firing()) and now - last >= REPEAT)
        assert bool(said.notifications) == due
        for notification in said.notifications:
            last = now
            assert {a.subject for a in notification.firing} == watched.firing()
            assert {a.subject for a in notification.resolved} == {e.subject for e in said.events if e.state != "firing"}


# -- groups and names ------------------------------------------------------------------------------------------------


def test_each_deployment_and_rule_is_a_group_of_its_own() -> None:
    watched = Watched.new()
    said = watched.look(
        START,
        [
            reading("bad", "d/0", "shard_without_replica"),
            reading("bad", "d/1", "shard_without_replica"),
            reading("bad", "e/0", "shard_without_replica", deployment="e"),
            reading("bad", "w", "service_down"),
        ],
    )
    assert [(n.group, len(n.firing)) for n in said.notifications] == [
        (("service_down", "d", ""), 1),
        (("shard_without_replica", "d", ""), 2),
        (("shard_without_replica", "e", ""), 1),
    ]


def test_a_restarted_monitor_repeats_nothing_and_ends_what_is_over() -> None:
    first = Watched.new()
    first.look(START, [reading("bad", "x", "service_down"), reading("bad", "y", "service_down")])
    state = adopted({}, first.told, START + 5)
    assert [(alert.since, alert.firing) for alert in state.values()] == [(START, True)] * 2
    state, closed = step(
        state, [reading("bad", "x", "service_down"), reading("good", "y", "service_down")], START + 6, SETTINGS
    )
    said = telling(first.told, state, closed, START + 6, REPEAT)
    assert [(e.subject, e.state) for e in said.events] == [("y", "resolved")]
    assert [a.started for a in said.told] == [START]


def test_what_was_told_by_a_later_release_is_left_out() -> None:
    told = [OpenAlert(kind="too_quiet", subject="a")]
    assert adopted({}, told, START) == {}


def test_services_that_share_an_instance_name_have_alerts_of_their_own() -> None:
    both = [Reading("service_down", "node-1", "bad", "gone", service=service) for service in ("expert", "gateway")]
    state, _ = step({}, both, START, SETTINGS)
    alerts = [open_alert(alert) for alert in state.values()]
    assert len({key_of(a) for a in alerts}) == len({fingerprint(a) for a in alerts}) == 2
    assert len({group_of(a) for a in alerts}) == 2
    assert {key_of(a) for a in alerts} == {r.key for r in both}
