"""Which copies a worker loads, reports and drops."""

from __future__ import annotations

from services.expert.copies import GRACE_SECONDS, Copies, copies_of
from services.monitor.messages import ExpertPlan, SplitExpert
from shared.status import Status

MOE_LAYERS = (1, 3)
SHARDS = 4


def plan(
    epoch: int, *split: tuple[int, int, tuple[int, ...]], time: float = 0.0, num_shards: int = SHARDS
) -> ExpertPlan:
    """A plan that splits (layer, expert) evenly among two shards, or gives it to one."""
    experts = tuple(
        SplitExpert(layer=layer, expert=expert, shards=tuple((s, 256 // len(shards)) for s in shards))
        for layer, expert, shards in split
    )
    return ExpertPlan(
        epoch=epoch, num_shards=num_shards, experts=experts, time=time, before=2.0, expected=1.0, reason=""
    )


def router(epoch: int, instance: str = "router-1") -> Status:
    return Status(service="router", instance=instance, state="ready", epoch=epoch)


FIRST = plan(1, (0, 0, (0, 1)), (1, 4, (1, 2)), (1, 6, (3,)))


def test_a_worker_needs_what_is_for_its_shards_and_not_its_own() -> None:
    assert copies_of(FIRST, [1], MOE_LAYERS) == {(1, 0), (3, 4)}
    assert copies_of(FIRST, [2], MOE_LAYERS) == {(3, 4)}
    assert copies_of(FIRST, [3], MOE_LAYERS) == {(3, 6)}
    assert copies_of(FIRST, [0], MOE_LAYERS) == set(), "expert 0 is its own, and no other is for it"
    assert copies_of(FIRST, [0, 1, 2], MOE_LAYERS) == set(), "experts 0, 4 and 6 are its own"
    assert copies_of(FIRST, [], MOE_LAYERS) == set()


def test_it_reports_a_plan_once_all_of_its_copies_are_there() -> None:
    copies = Copies(MOE_LAYERS, 8, SHARDS)
    assert copies.epoch([1]) == 0
    assert copies.missing([1]) == []
    assert copies.tell(FIRST)
    assert copies.missing([1]) == [(1, 0), (3, 4)]
    assert copies.epoch([1]) == 0
    assert copies.epoch([0]) == 1, "for shard 0 the plan asks nothing"
    copies.held = frozenset([(1, 0)])
    assert copies.missing([1]) == [(3, 4)]
    assert copies.epoch([1]) == 0
    copies.held = frozenset([(1, 0), (3, 4)])
    assert copies.missing([1]) == []
    assert copies.epoch([1]) == 1


def test_while_the_next_plan_loads_it_still_reports_the_one_before() -> None:
    copies = Copies(MOE_LAYERS, 8, SHARDS)
    copies.tell(FIRST)
    copies.held = frozenset([(1, 0), (3, 4)])
    copies.tell(plan(2, (0, 3, (1,))))
    assert copies.epoch([1]) == 1
    assert copies.missing([1]) == [(1, 3)]
    copies.held |= {(1, 3)}
    assert copies.epoch([1]) == 2


def test_a_shard_that_is_taken_over_brings_its_copies_along() -> None:
    copies = Copies(MOE_LAYERS, 8, SHARDS)
    copies.tell(FIRST)
    copies.held = frozenset([(1, 0), (3, 4)])
    assert copies.epoch([1, 3]) == 0, "what shard 3 needs is not there"
    assert copies.missing([1, 3]) == [(3, 6)]


def test_what_no_plan_needs_is_dropped_when_all_routers_have_gone_over_and_their_calls_are_over() -> None:
    copies = Copies(MOE_LAYERS, 8, SHARDS)
    copies.tell(FIRST)
    copies.held = frozenset([(1, 0), (3, 4)])
    assert not copies.spare([1], [router(1)], 0.0)
    assert not copies.spare([1], [router(1)], GRACE_SECONDS + 1), "the plan needs all of it"
    copies.tell(plan(2, (0, 0, (0, 1))))
    behind = [router(2), router(1, "router-2")]
    assert not copies.spare([1], behind, 100.0)
    assert not copies.spare([1], [], 150.0), "no router that is heard of says nothing"
    over = [router(2), router(2, "router-2")]
    assert not copies.spare([1], over, 200.0)
    assert not copies.spare([1], behind, 201.0), "one came back with an older plan: the wait begins anew"
    assert not copies.spare([1], over, 202.0)
    assert not copies.spare([1], over, 202.0 + GRACE_SECONDS - 0.1)
    assert copies.spare([1], over, 202.0 + GRACE_SECONDS) == {(3, 4)}


def test_nothing_is_dropped_while_something_is_still_to_be_loaded() -> None:
    copies = Copies(MOE_LAYERS, 8, SHARDS)
    copies.tell(plan(2, (0, 3, (1,))))
    copies.held = frozenset([(3, 4)])
    assert not copies.spare([1], [router(2)], 0.0)
    assert not copies.spare([1], [router(2)], 2 * GRACE_SECONDS)


def test_an_older_plan_one_heard_before_and_one_for_another_model_are_ignored() -> None:
    copies = Copies(MOE_LAYERS, 8, SHARDS)
    assert copies.tell(plan(2, (0, 0, (0, 1))))
    assert not copies.tell(FIRST)
    assert not copies.tell(plan(2, (0, 0, (0, 1))))
    assert copies.tell(plan(2, (0, 0, (0, 2)), time=1.0)), "of one epoch, the later one"
    assert not copies.tell(plan(3, (2, 0, (0, 1)))), "there is no third layer"
    assert not copies.tell(plan(3, (0, 8, (0, 1)))), "there is no ninth expert"
    assert not copies.tell(plan(3, (0, 0, (0, 4)))), "there is no fifth shard"
    assert not copies.tell(plan(3, (0, 0, (0, 1)), num_shards=2))
