"""Which shards a worker takes: a pure function of the fleet's reports, the same on every worker, so no one decides."""

from __future__ import annotations

from collections.abc import Sequence

from shared.status import Status


def choose_shards(me: Status, workers: Sequence[Status], num_shards: int, expected_workers: int) -> tuple[int, ...]:
    """The shards that `me`, a worker without shards, should load.

    Every worker in state "starting" is placed in turn, oldest first, on the least replicated shards; `me` takes what
    falls to it. Workers that decide at the same moment from the same reports so agree without talking.

    Args:
        me: this worker's own report.
        workers: live reports of the deployment's workers; with or without `me`.
        num_shards: S.
        expected_workers: how many workers are to share the shards.

    """
    others = [w for w in workers if w.instance != me.instance]
    replicas = [0] * num_shards
    for worker in others:
        for shard in {*worker.shards, *worker.wanted_shards}:
            if shard < num_shards:
                replicas[shard] += 1
    quota = -(-num_shards // max(expected_workers, len(others) + 1))
    joining = [w for w in others if w.state == "starting" and not w.wanted_shards]
    for worker in sorted([*joining, me], key=lambda w: (w.started, w.instance)):
        taken = sorted(range(num_shards), key=lambda shard: (replicas[shard], shard))[:quota]
        if worker.instance == me.instance:
            return tuple(sorted(taken))
        for shard in taken:
            replicas[shard] += 1
    raise AssertionError("unreachable: me is among the joining workers")


def shards_to_take_over(me: Status, workers: Sequence[Status], num_shards: int) -> tuple[int, ...]:
    """Shards that nobody serves or loads and that fall to `me`: each goes to the ready worker with fewest shards."""
    ready = {
        w.instance: len({*w.shards, *w.wanted_shards}) for w in [*workers, me] if w.state == "ready" and not w.pinned
    }
    if me.instance not in ready:
        return ()
    claimed = {shard for w in [*workers, me] for shard in {*w.shards, *w.wanted_shards}}
    mine = []
    for shard in range(num_shards):
        if shard in claimed:
            continue
        chosen = min(ready, key=lambda instance: (ready[instance], instance))
        ready[chosen] += 1
        if chosen == me.instance:
            mine.append(shard)
    return tuple(mine)


def shards_to_hand_over(me: Status, workers: Sequence[Status]) -> tuple[int, ...]:
    """Shards of `me`, which drains, that no ready worker serves, if there is one that will take them over."""
    served = {shard for w in workers if w.state == "ready" for shard in w.shards}
    if not any(w.state == "ready" and not w.pinned for w in workers):
        return ()
    return tuple(shard for shard in me.shards if shard not in served)


def removable(ready: Sequence[Status], count: int) -> tuple[str, ...]:
    """Up to `count` of the `ready` instances of a service that may be drained together, the newest first.

    Whoever alone holds a shard stays; so there are fewer than `count` if placement needs the others. Routers, which
    hold no shards, may all go.
    """
    holders: dict[tuple[str, int], int] = {}
    for worker in ready:
        for shard in worker.shards:
            holders[worker.deployment, shard] = holders.get((worker.deployment, shard), 0) + 1
    going: list[str] = []
    for worker in sorted(ready, key=lambda w: (w.started, w.instance), reverse=True):
        mine = [(worker.deployment, shard) for shard in worker.shards]
        if len(going) < count and all(holders[key] > 1 for key in mine):
            going.append(worker.instance)
            for key in mine:
                holders[key] -= 1
    return tuple(going)
