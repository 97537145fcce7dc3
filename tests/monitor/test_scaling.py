"""How many there should be: what the rules promise, whatever is seen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.monitor.observations import Observation
from services.monitor.rules import Verdict
from services.monitor.scaling import Decision, Limits, ScalingState, by_hand, decide, scaling_ineffective
from tests.monitor.fleets import expert, fleet, gateway, router, seen

LIMITS = Limits()
SETTLED = ScalingState(since=-1000.0)
"""A monitor that has listened for long and changed nothing."""
COUNTS = st.integers(2, 16)
SHARES = st.floats(0, 3)


def rules(decision: Decision) -> set[str]:
    return {held.rule for held in decision.held}


def settled(observation: Observation, limits: Limits = LIMITS) -> Decision:
    return decide("expert", observation, SETTLED, limits)[0]


def played(
    load: Callable[[float], float], seconds: int, *, count: int = 2, limits: Limits = LIMITS, step: int = 1
) -> list[Decision]:
    """The decisions of each `step` seconds, obeyed at once, for a load in workers' worth of computing."""
    state, decisions = SETTLED, []
    for second in range(0, seconds, step):
        busy = load(second) / count
        decision, state = decide("expert", fleet(float(second), count, busy), state, limits)
        count = decision.desired
        decisions.append(decision)
    return decisions


def changes(decisions: Iterable[Decision]) -> list[tuple[float, int]]:
    return [(d.time, d.desired - d.current) for d in decisions if d.desired != d.current]


# -- the count ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("busy", "wanted"),
    [(0.0, 1), (0.29, 2), (0.31, 4), (0.5, 4), (0.8, 4), (0.81, 5), (0.9, 5), (1.0, 6), (1.4, 8), (3.0, 17)],
)
def test_the_count_is_in_proportion_to_the_usage_and_stays_between_the_thresholds(busy: float, wanted: int) -> None:
    assert settled(fleet(0.0, 4, busy)).wanted == wanted


@pytest.mark.parametrize(
    ("name", "observation"),
    [
        ("cpu_usage", fleet(0.0, 2, 0.9)),
        ("memory_usage", seen(0.0, expert(0, available=0.1, weights=0.2), expert(1), router(), gateway())),
        ("response_time", fleet(0.0, 2, 0.5, router(), gateway(0.6))),
        ("queue_depth", fleet(0.0, 2, 0.5, router(waiting=6), gateway(waiting=2, refused=1))),
    ],
)
def test_each_of_the_four_metrics_can_ask_for_more(name: str, observation: Observation) -> None:
    decision = settled(observation)
    assert (decision.winner, decision.action) == (name, "up"), decision.text
    assert name in decision.text


def test_the_metric_that_asks_for_the_most_wins() -> None:
    decision = settled(fleet(0.0, 4, 0.9, router(waiting=30), gateway(0.6)))
    asked = {r.usage.metric: r.wanted for r in decision.readings}
    assert decision.winner == "queue_depth"
    assert decision.wanted == asked["queue_depth"] == max(c for c in asked.values() if c is not None)


def test_line_and_latency_go_to_the_account_of_whoever_is_busier() -> None:
    others = (router(0, cpu=0.75, waiting=20), gateway(2.0))
    experts, _ = decide("expert", fleet(0.0, 2, 0.4, *others), SETTLED, LIMITS)
    routers, _ = decide("router", fleet(0.0, 2, 0.4, *others), SETTLED, Limits(least=1, most=4))
    assert (experts.action, routers.action) == ("hold", "up")


def test_a_full_kv_cache_asks_for_routers() -> None:
    observation = seen(0.0, expert(0), expert(1), router(kv=0.95), gateway())
    assert decide("router", observation, SETTLED, Limits(least=1, most=4))[0].winner == "memory_usage"


def test_memory_that_weights_dominate_never_asks_for_more() -> None:
    heavy = [expert(n, weights=50, available=0.01) for n in range(2)]
    decision = settled(seen(0.0, *heavy, router(), gateway()))
    assert decision.action == "hold"
    assert "weights" in rules(decision)


@given(COUNTS, SHARES, SHARES, st.integers(0, 200), st.integers(0, 200))
def test_more_load_never_asks_for_fewer(count: int, busy: float, more: float, line: int, longer: int) -> None:
    low = fleet(0.0, count, min(busy, more), waiting=min(line, longer))
    high = fleet(0.0, count, max(busy, more), waiting=max(line, longer))
    assert settled(low).wanted <= settled(high).wanted
    assert settled(low).desired <= settled(high).desired


@given(COUNTS, SHARES, st.integers(0, 500), st.integers(1, 8), st.integers(8, 16))
def test_a_change_stays_within_the_bounds(count: int, busy: float, line: int, least: int, most: int) -> None:
    limits = replace(LIMITS, least=least, most=most, window=0.0)
    decision = settled(fleet(0.0, count, busy, waiting=line), limits)
    if decision.desired != count:
        assert least <= decision.desired <= most
    assert decision.desired <= max(2 * count, least)


def test_too_few_become_the_least_even_without_load() -> None:
    assert settled(fleet(0.0, 1, 0.0)).desired == 2


def test_too_many_become_the_most_even_under_load() -> None:
    assert settled(fleet(0.0, 5, 2.0), replace(LIMITS, most=4)).desired == 4


# -- time --------------------------------------------------------------------------------------------------------------


def test_up_at_once_and_down_after_a_whole_window() -> None:
    decisions = played(lambda t: 3.0 if t < 100 else 0.3, 600)
    found = changes(decisions)
    assert found[0][0] == 0.0
    downs = [time for time, change in found if change < 0]
    assert downs
    assert downs[0] >= 100 + LIMITS.window
    assert decisions[-1].desired == LIMITS.least


def test_one_moment_of_load_begins_the_window_anew() -> None:
    decisions = played(lambda t: 1.6 if t == 200 else 0.3, 600, count=4)
    assert next(time for time, change in changes(decisions) if change < 0) == 201 + LIMITS.window


@settings(max_examples=25)
@given(st.integers(2, 58), st.floats(1.0, 8.0), st.integers(2, 6))
def test_a_square_wave_shorter_than_the_cooldown_makes_no_flapping(half: int, peak: float, count: int) -> None:
    found = changes(played(lambda t: peak if (t // half) % 2 else 0.1, 900, count=count, step=2))
    assert len({change > 0 for _, change in found}) <= 1  # up to what the peaks need, or down to it, and it stays there


@settings(max_examples=25)
@given(st.lists(st.floats(0, 12), min_size=5, max_size=40), st.integers(5, 60))
def test_no_two_changes_within_a_cooldown(loads: list[float], hold: int) -> None:
    found = changes(
        played(lambda t: loads[int(t) // hold % len(loads)], 1200, limits=replace(LIMITS, window=30.0), step=5)
    )
    assert all(b[0] - a[0] >= LIMITS.cooldown for a, b in itertools.pairwise(found))


@settings(max_examples=25)
@given(st.lists(st.floats(0, 30), min_size=1, max_size=20))
def test_whatever_comes_the_count_stays_within_the_bounds(loads: list[float]) -> None:
    decisions = played(
        lambda t: loads[int(t) // 60 % len(loads)], 1800, limits=replace(LIMITS, window=60.0, most=6), step=10
    )
    assert all(2 <= d.desired <= 6 for d in decisions)


@settings(max_examples=25)
@given(st.floats(0.2, 10))
def test_a_steady_load_is_answered_by_a_steady_count(load: float) -> None:
    found = changes(played(lambda _: load, 3600, count=4, step=20))
    assert len({change > 0 for _, change in found}) <= 1, "up and down again"
    assert not [time for time, _ in found if time > 1200]


@given(COUNTS, SHARES)
def test_after_a_restart_what_runs_is_kept_for_a_cooldown(count: int, busy: float) -> None:
    state = ScalingState()
    for second in range(0, int(LIMITS.cooldown), 10):
        decision, state = decide("expert", fleet(1000.0 + second, count, busy), state, replace(LIMITS, window=0.0))
        assert decision.desired == count


def test_a_monitor_that_has_heard_nobody_yet_asks_for_nothing() -> None:
    state = ScalingState()
    for second in range(30):
        decision, state = decide("expert", seen(float(second)), state, LIMITS)
        assert decision.action == "hold"
        assert "restarted" in rules(decision)


def test_what_was_asked_for_by_hand_stands_for_a_cooldown() -> None:
    state = by_hand(SETTLED, 0.0, 2)
    early, _ = decide("expert", fleet(30.0, 2, 1.5), state, LIMITS)
    late, _ = decide("expert", fleet(61.0, 2, 1.5), state, LIMITS)
    assert early.action == "hold"
    assert "by_hand" in rules(early)
    assert late.action == "up"


def test_those_on_their_way_are_waited_for() -> None:
    state = ScalingState(since=-1000.0, changed=0.0, target=4)
    half = seen(
        70.0, expert(0, 1.5), expert(1, 1.5), expert(2, state="loading", started=5.0),
        expert(3, state="starting", started=5.0), router(), gateway(),
    )  # fmt: skip
    decision, _ = decide("expert", half, state, LIMITS)
    assert (decision.current, decision.action, rules(decision)) == (4, "hold", {"starting"})


# -- what is not known ---------------------------------------------------------------------------------------------------


def idle(now: float, **changed: object) -> Observation:
    """Six workers without load, of which something is not known."""
    experts = [expert(n, 0.0) for n in range(6)]
    parts = {"experts": experts, "router": [router()], "gateway": [gateway(None)], **changed}
    return seen(now, *(m for group in parts.values() for m in group))  # type: ignore[attr-defined]


UNKNOWN: dict[str, Callable[[float], Observation]] = {
    "a worker is silent": lambda t: idle(t, experts=[*[expert(n, 0.0) for n in range(5)], expert(5, age=9.0)]),
    "the gateway is silent": lambda t: idle(t, gateway=[gateway(None, age=9.0)]),
    "there is no gateway": lambda t: idle(t, gateway=[]),
    "there is no router": lambda t: idle(t, router=[]),
    "nobody is ready": lambda t: idle(t, experts=[expert(n, state="loading") for n in range(6)]),
    "NATS is gone": lambda t: replace(idle(t), connected=False),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_nothing_goes_while_something_is_not_known(name: str) -> None:
    state = SETTLED
    for second in range(0, 1200, 5):
        decision, state = decide("expert", UNKNOWN[name](float(second)), state, LIMITS)
        assert decision.action == "hold", decision.text


def test_the_same_fleet_shrinks_once_all_is_known() -> None:
    state = SETTLED
    for second in range(0, 1200, 5):
        decision, state = decide("expert", idle(float(second)), state, LIMITS)
        if decision.action == "down":
            break
    assert decision.desired == 2


@settings(max_examples=25)
@given(st.sampled_from(sorted(UNKNOWN)), st.integers(1, 29))
def test_a_gap_begins_the_window_of_low_load_anew(name: str, gap: int) -> None:
    state = SETTLED
    for second in range(0, int(LIMITS.window) + 10 * gap, 10):
        observe = UNKNOWN[name] if second == 10 * gap else idle
        decision, state = decide("expert", observe(float(second)), state, LIMITS)
        assert decision.action == "hold"


def test_more_are_asked_for_though_something_else_is_not_known() -> None:
    decision = settled(fleet(0.0, 2, 0.95, router(), gateway(age=9.0)))
    assert (decision.action, decision.winner) == ("up", "cpu_usage")


# -- placement ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.frozensets(st.integers(0, 5), min_size=1), min_size=2, max_size=8))
def test_no_shard_loses_its_last_worker(held: list[frozenset[int]]) -> None:
    experts = [expert(n, 0.0, shards=tuple(sorted(shards))) for n, shards in enumerate(held)]
    state, limits = SETTLED, replace(LIMITS, least=1)
    for second in range(0, 400, 20):
        decision, state = decide("expert", seen(float(second), *experts, router(), gateway(None)), state, limits)
        if decision.action == "down":
            # The least that can be left: a worker whose shards all have another holder may go.
            assert decision.desired >= least_cover(held)
            return
    assert math.isclose(decision.desired, len(held))


def least_cover(held: list[frozenset[int]]) -> int:
    """The fewest workers that hold all shards, by trying."""
    everything = frozenset().union(*held)
    best = len(held)
    for chosen in range(1, 2 ** len(held)):
        kept = [shards for n, shards in enumerate(held) if chosen >> n & 1]
        if frozenset().union(*kept) == everything:
            best = min(best, len(kept))
    return best


def test_the_last_copy_of_a_shard_keeps_a_worker() -> None:
    experts = [expert(0, 0.0, shards=(0,)), expert(1, 0.0, shards=(1,)), expert(2, 0.0, shards=(2,))]
    state = SETTLED
    for second in range(0, 400, 10):
        decision, state = decide("expert", seen(float(second), *experts, router(), gateway(None)), state, LIMITS)
    assert decision.action == "hold"
    assert "placement" in rules(decision)


@pytest.mark.parametrize(
    ("num_shards", "current", "busy", "desired"),
    [
        (2, 2, 0.95, 4),
        (2, 4, 0.95, 6),
        (4, 4, 0.85, 8),
        (4, 12, 0.25, 8),
        (16, 2, 0.95, 3),
        (9, 9, 0.9, 12),
        (1, 2, 0.95, 3),
    ],
)
def test_each_shard_gets_as_many_workers_as_the_others(
    num_shards: int, current: int, busy: float, desired: int
) -> None:
    everything = tuple(range(num_shards))
    experts = [expert(n, busy, shards=everything, num_shards=num_shards) for n in range(current)]
    state = replace(SETTLED, low_since=-1000.0)
    decision, _ = decide("expert", seen(0.0, *experts, router(), gateway()), state, LIMITS)
    assert decision.desired == desired, decision.text


# -- what does not help ------------------------------------------------------------------------------------------------


def futile(limits: Limits, tokens: Callable[[int], int], seconds: int = 900) -> tuple[list[Decision], list[Verdict]]:
    """A load that stays as high however many there are, `tokens` by the count; and what the alert's readings say."""
    state, count = SETTLED, 2
    decisions: list[Decision] = []
    verdicts: list[Verdict] = []
    for second in range(seconds):
        observation = fleet(float(second), count, 0.95, router(tokens=tokens(count)), gateway())
        decision, state = decide("expert", observation, state, limits)
        count = decision.desired
        decisions.append(decision)
        verdicts.append(scaling_ineffective("expert", state, limits).verdict)
    return decisions, verdicts


def test_scale_ups_that_change_nothing_end_with_one_alert() -> None:
    decisions, verdicts = futile(LIMITS, lambda _: 1000)
    begins = verdicts.index("bad")
    assert set(verdicts[:begins]) == {"good"}
    assert set(verdicts[begins:]) == {"bad"}
    assert len(changes(decisions)) == LIMITS.attempts
    assert "ineffective" in rules(decisions[-1])
    assert decisions[-1].desired < LIMITS.most


def test_scale_ups_that_a_growing_load_eats_up_go_on() -> None:
    decisions, verdicts = futile(LIMITS, lambda count: 500 * count)
    assert set(verdicts) == {"good"}
    assert decisions[-1].desired == LIMITS.most


def test_after_the_load_has_fallen_it_may_be_tried_again() -> None:
    state = replace(SETTLED, futile=LIMITS.attempts)
    assert decide("expert", fleet(0.0, 4, 0.95), state, LIMITS)[0].action == "hold"
    _, state = decide("expert", fleet(1.0, 4, 0.5), state, LIMITS)
    assert decide("expert", fleet(2.0, 4, 0.95), state, LIMITS)[0].action == "up"


@given(COUNTS, SHARES, st.integers(0, 50))
def test_every_decision_says_why(count: int, busy: float, line: int) -> None:
    decision = settled(fleet(0.0, count, busy, waiting=line))
    assert decision.text
    assert len(decision.readings) == 4
    assert all(r.usage.text for r in decision.readings)
    if decision.wanted != decision.desired:
        assert decision.held
