"""Which plan a router follows: when it goes over to one, and what it does without a worker's copies."""

from __future__ import annotations

from typing import Any

import numpy as np

from services.monitor.messages import ExpertPlan, SplitExpert
from services.router.routes import PATIENCE_SECONDS, Routes
from shared.status import Status

LAYERS, EXPERTS, SHARDS = 1, 4, 2


def worker(instance: str, *shards: int, epoch: int = 0, **more: Any) -> Status:
    return Status(
        **{
            "service": "expert",
            "instance": instance,
            "deployment": "d",
            "state": "ready",
            "shards": shards,
            "epoch": epoch,
            **more,
        }
    )


def plan(epoch: int, parts_moved: int = 128, **more: Any) -> ExpertPlan:
    """Expert 0, of shard 0, has `parts_moved` parts of its tokens in shard 1."""
    shards = ((0, 256 - parts_moved), (1, parts_moved)) if parts_moved < 256 else ((1, 256),)
    split = SplitExpert(layer=0, expert=0, shards=shards)
    whole = {"num_shards": SHARDS, "experts": (split,), "time": 0.0, "before": 2.0, "expected": 1.0, "reason": ""}
    return ExpertPlan(epoch=epoch, **{**whole, **more})


def routes(*workers: Status) -> Routes:
    made = Routes("d", LAYERS, EXPERTS, SHARDS)
    for status in workers:
        made.observe(status, 0.0)
    return made


def moved(of: Routes) -> int:
    """How many parts of expert 0 go to shard 1."""
    return 0 if of.table is None else int((of.table[0, 0] == 1).sum())


def test_without_a_plan_there_is_no_table() -> None:
    made = routes(worker("a", 0), worker("b", 1))
    assert made.table is None
    assert made.epoch == 0


def test_it_goes_over_to_a_plan_when_all_workers_have_loaded_it() -> None:
    made = routes(worker("a", 0), worker("b", 1), worker("c", 1))
    made.tell(plan(1), 1.0)
    made.observe(worker("b", 1, epoch=1), 2.0)
    made.observe(worker("a", 0, epoch=1), 2.0)
    assert (made.epoch, made.table) == (0, None)
    made.observe(worker("c", 1, epoch=1), 2.0)
    assert (made.epoch, moved(made)) == (1, 128)
    assert made.table is not None
    assert made.table[0, 1:].tolist() == np.repeat([[1], [0], [1]], 256, axis=1).tolist()


def test_a_plan_that_comes_after_the_workers_have_it_is_followed_at_once() -> None:
    made = routes(worker("a", 0, epoch=1), worker("b", 1, epoch=1))
    made.tell(plan(1), 1.0)
    assert (made.epoch, moved(made)) == (1, 128)


def test_while_the_next_plan_loads_it_follows_the_one_before() -> None:
    made = routes(worker("a", 0, epoch=1), worker("b", 1, epoch=1))
    made.tell(plan(1), 1.0)
    made.tell(plan(2, 64), 2.0)
    made.observe(worker("a", 0, epoch=2), 3.0)
    assert (made.epoch, moved(made)) == (1, 128)
    made.observe(worker("b", 1, epoch=2), 3.0)
    assert (made.epoch, moved(made)) == (2, 64)


def test_a_shard_with_a_worker_that_lacks_the_copies_gets_nothing_for_them() -> None:
    made = routes(worker("a", 0, epoch=1), worker("b", 1, epoch=1))
    made.tell(plan(1), 1.0)
    made.observe(worker("c", 1), 2.0)
    assert (made.epoch, moved(made)) == (1, 0)
    made.observe(worker("c", 1, epoch=1), 3.0)
    assert moved(made) == 128
    made.observe(worker("c", 1), 4.0)
    made.observe(worker("c", 1, state="draining"), 5.0)
    assert moved(made) == 128, "a worker that goes is none"


def test_a_shard_without_workers_gets_nothing_for_copies() -> None:
    made = routes(worker("a", 0, epoch=1), worker("b", 1, epoch=1))
    made.tell(plan(1), 1.0)
    made.look({"a"}, 2.0)
    assert (made.epoch, moved(made)) == (1, 0)
    made.observe(worker("d", 1, epoch=1), 3.0)
    assert moved(made) == 128


def test_it_does_not_wait_for_a_worker_for_ever() -> None:
    made = routes(worker("a", 0, epoch=1), worker("b", 1, epoch=1))
    made.tell(plan(1), 0.0)
    made.tell(plan(2, 256), 10.0)
    made.observe(worker("b", 1, epoch=2), 11.0)
    made.look({"a", "b"}, 10.0 + PATIENCE_SECONDS - 0.1)
    assert (made.epoch, moved(made)) == (1, 128)
    made.look({"a", "b"}, 10.0 + PATIENCE_SECONDS)
    assert (made.epoch, moved(made)) == (2, 256)


def test_plans_and_reports_that_are_not_for_it_change_nothing() -> None:
    made = routes(worker("a", 0, epoch=9), worker("b", 1, epoch=9))
    made.tell(plan(2), 1.0)
    made.tell(plan(1, 64), 2.0)
    made.tell(plan(2, 64), 2.0)
    made.tell(plan(3, 64, num_shards=3), 2.0)
    made.tell(plan(3, 64, experts=(SplitExpert(layer=1, expert=0, shards=((1, 256),)),)), 2.0)
    made.observe(worker("x", 1, deployment="other"), 3.0)
    made.observe(worker("y", 1, service="router"), 3.0)
    assert (made.epoch, moved(made)) == (2, 128)


def test_a_plan_that_takes_everything_back_leaves_no_table() -> None:
    made = routes(worker("a", 0, epoch=2), worker("b", 1, epoch=2))
    made.tell(plan(1), 1.0)
    made.tell(plan(2, experts=()), 2.0)
    assert (made.epoch, made.table) == (2, None)
