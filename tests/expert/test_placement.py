"""Placement: workers that decide alone, from the same reports, together cover every shard, evenly and without overlap."""

from __future__ import annotations

import itertools
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.expert.placement import choose_shards, removable, shards_to_take_over
from shared.status import State, Status


def worker(
    number: int,
    state: State = "starting",
    shards: tuple[int, ...] = (),
    wanted: tuple[int, ...] = (),
    started: float = 0.0,
) -> Status:
    return Status(
        service="expert", instance=f"w{number}", state=state, shards=shards, wanted_shards=wanted, started=started
    )


@st.composite
def starting_together(draw: st.DrawFn) -> list[Status]:
    """Workers that start at the same time, in any order, some at the same moment."""
    count = draw(st.integers(1, 12))
    return [worker(n, started=draw(st.integers(0, 5)) / 2) for n in draw(st.permutations(range(count)))]


@st.composite
def settled(draw: st.DrawFn, num_shards: int) -> list[Status]:
    """Workers that serve or load shards already."""
    fleet = []
    for number in range(draw(st.integers(0, 8))):
        own = draw(st.lists(st.integers(0, num_shards - 1), unique=True, min_size=1, max_size=num_shards))
        ready = draw(st.booleans())
        fleet.append(
            worker(
                100 + number, "ready" if ready else "loading", tuple(own) if ready else (), () if ready else tuple(own)
            )
        )
    return fleet


def everybody_chooses(fleet: list[Status], num_shards: int, expected: int) -> dict[str, tuple[int, ...]]:
    return {me.instance: choose_shards(me, fleet, num_shards, expected) for me in fleet if me.state == "starting"}


@settings(deadline=None)
@given(starting_together(), st.integers(1, 40))
def test_workers_that_start_together_cover_all_shards_evenly(fleet: list[Status], num_shards: int) -> None:
    chosen = everybody_chooses(fleet, num_shards, len(fleet))
    replicas = [sum(shard in shards for shards in chosen.values()) for shard in range(num_shards)]
    assert min(replicas) >= 1
    assert max(replicas) - min(replicas) <= 1
    sizes = [len(shards) for shards in chosen.values()]
    assert max(sizes) == min(sizes) == -(-num_shards // len(fleet))


@settings(deadline=None)
@given(starting_together(), st.integers(1, 40), st.integers(1, 12))
def test_a_choice_is_sorted_valid_and_never_empty(fleet: list[Status], num_shards: int, expected: int) -> None:
    for shards in everybody_chooses(fleet, num_shards, expected).values():
        assert shards
        assert list(shards) == sorted(set(shards))
        assert set(shards) <= set(range(num_shards))


@settings(deadline=None)
@given(st.data())
def test_joining_workers_leave_no_shard_with_less_than_another_needs(data: st.DataObject) -> None:
    num_shards = data.draw(st.integers(1, 16))
    old, new = data.draw(settled(num_shards)), data.draw(starting_together())
    fleet = [*old, *new]
    before = [sum(shard in {*w.shards, *w.wanted_shards} for w in old) for shard in range(num_shards)]
    chosen = everybody_chooses(fleet, num_shards, 1)
    after = [b + sum(shard in shards for shards in chosen.values()) for shard, b in enumerate(before)]
    added = [a - b for a, b in zip(after, before, strict=True)]
    # Whoever got a replica had no more than anybody who got one less.
    assert all(
        before[i] + added[i] - 1 <= before[j] + added[j]
        for i in range(num_shards)
        if added[i]
        for j in range(num_shards)
    )


@settings(deadline=None)
@given(starting_together(), st.integers(1, 20), st.integers(1, 12), st.randoms(use_true_random=False))
def test_a_choice_does_not_depend_on_the_order_of_the_reports(
    fleet: list[Status], num_shards: int, expected: int, order: Random
) -> None:
    me = fleet[0]
    shuffled = list(fleet)
    order.shuffle(shuffled)
    assert choose_shards(me, fleet, num_shards, expected) == choose_shards(me, shuffled, num_shards, expected)


def test_whether_ones_own_report_has_come_back_makes_no_difference() -> None:
    me, other = worker(0, started=2), worker(1, started=1)
    assert choose_shards(me, [other], 4, 2) == choose_shards(me, [me, other], 4, 2)


def test_fewer_workers_than_expected_take_their_own_part_only() -> None:
    assert choose_shards(worker(0), [], num_shards=4, expected_workers=4) == (0,)


def test_a_late_worker_takes_what_has_fewest_replicas() -> None:
    fleet = [worker(1, "ready", (0, 1)), worker(2, "ready", (0, 2)), worker(3, "loading", wanted=(1, 3))]
    assert choose_shards(worker(0), fleet, num_shards=4, expected_workers=2) == (2, 3)


def grown(num_shards: int, first: int, last: int) -> list[tuple[int, ...]]:
    """What each worker holds, of `first` that start together and others that join one by one."""
    fleet = [worker(n, started=n) for n in range(first)]
    chosen = everybody_chooses(fleet, num_shards, first)
    ready = [worker(n, "ready", chosen[f"w{n}"]) for n in range(first)]
    for number in range(first, last):
        ready.append(worker(number, "ready", choose_shards(worker(number), ready, num_shards, number + 1)))
    return [w.shards for w in ready]


def busiest(held: list[tuple[int, ...]]) -> float:
    """The load of the busiest worker, if each shard's work is spread over its workers; all of the work is S."""
    replicas = {shard: sum(shard in shards for shards in held) for held_by in held for shard in held_by}
    return max(sum(1 / replicas[shard] for shard in shards) for shards in held)


@pytest.mark.parametrize(("num_shards", "first", "last"), [(2, 2, 4), (4, 2, 4), (8, 2, 4), (16, 2, 4), (16, 4, 8)])
def test_twice_the_workers_nearly_halve_what_the_busiest_has_to_do(num_shards: int, first: int, last: int) -> None:
    before, after = busiest(grown(num_shards, first, first)), busiest(grown(num_shards, first, last))
    assert before == num_shards / first
    assert after <= 0.6 * before


@settings(deadline=None)
@given(st.integers(1, 24), st.integers(1, 6), st.integers(1, 6))
def test_who_joins_makes_nobody_busier(num_shards: int, first: int, more: int) -> None:
    held = grown(num_shards, first, first + more)
    loads = [busiest(held[:count]) for count in range(first, first + more + 1)]
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(loads))


@settings(deadline=None)
@given(st.lists(st.frozensets(st.integers(0, 5)), max_size=8), st.integers(0, 8))
def test_who_may_go_leaves_no_shard_without_a_worker(held: list[frozenset[int]], count: int) -> None:
    fleet = [worker(n, "ready", tuple(sorted(shards)), started=n) for n, shards in enumerate(held)]
    going = removable(fleet, count)
    assert len(set(going)) == len(going) <= count
    left = [shards for n, shards in enumerate(held) if f"w{n}" not in going]
    assert frozenset().union(*left) == frozenset().union(*held)


def test_the_newest_go_first() -> None:
    fleet = [worker(n, "ready", (0,), started=started) for n, started in enumerate((3.0, 9.0, 5.0, 7.0))]
    assert removable(fleet, 2) == ("w1", "w3")
    assert removable(fleet, 9) == ("w1", "w3", "w2")


def test_shards_of_another_sharding_are_ignored() -> None:
    fleet = [worker(1, "ready", (0, 7))]
    assert choose_shards(worker(0), fleet, num_shards=2, expected_workers=2) == (1,)


# -- taking over -------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.data())
def test_each_lost_shard_is_taken_over_by_exactly_one_ready_worker(data: st.DataObject) -> None:
    num_shards = data.draw(st.integers(1, 16))
    fleet = [*data.draw(settled(num_shards)), *data.draw(st.just([]) | starting_together())]
    taken = {w.instance: shards_to_take_over(w, fleet, num_shards) for w in fleet}
    claimed = {shard for w in fleet for shard in {*w.shards, *w.wanted_shards}}
    lost = [shard for shard in range(num_shards) if shard not in claimed]
    ready = [w for w in fleet if w.state == "ready"]
    got = sorted(shard for shards in taken.values() for shard in shards)
    assert got == (lost if ready else [])
    assert all(not taken[w.instance] for w in fleet if w.state != "ready")


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(0, 24))
def test_lost_shards_are_shared_evenly(workers: int, lost: int) -> None:
    fleet = [worker(n, "ready", (n,)) for n in range(workers)]
    taken = [len(shards_to_take_over(w, fleet, workers + lost)) for w in fleet]
    assert sum(taken) == lost
    assert max(taken) - min(taken) <= 1


def test_whoever_has_fewest_shards_takes_over() -> None:
    fleet = [worker(0, "ready", (0, 1)), worker(1, "ready", (2,)), worker(2, "ready", (0, 1))]
    assert [shards_to_take_over(w, fleet, 4) for w in fleet] == [(), (3,), ()]


@pytest.mark.parametrize("state", ["starting", "loading", "draining"])
def test_a_worker_that_is_not_ready_takes_over_nothing(state: State) -> None:
    assert shards_to_take_over(worker(0, state), [worker(1, "ready", (0,))], 4) == ()


def test_what_somebody_is_loading_is_not_lost() -> None:
    fleet = [worker(0, "ready", (0,)), worker(1, "loading", wanted=(1,))]
    assert shards_to_take_over(fleet[0], fleet, 2) == ()
