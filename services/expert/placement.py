"""Which shards a worker takes: a pure function of the fleet's reports, the same on every worker, so no one decides."""

from __future__ import annotations

from collections.abc import Sequence

from shared.status import Status

ROUNDING = 1e-9


def choose_shards(me: Status, workers: Sequence[Status], num_shards: int, expected_workers: int) -> tuple[int, ...]:
    """The shards that `me`, a worker without shards, should load.

    Every worker in state "starting" is placed in turn, oldest first, on the least replicated shards; `me` takes what
    falls to it. Workers that decide at the same moment from the same reports so agree without talking.

    Who joins a fleet that serves already relieves it: of equally replicated shards it takes those of the busiest
    worker, and, beyond its quota, more of the least replicated, as long as it stays less busy than that one. A shard
    with r replicas counts as 1/r to each of them, as routers spread its tokens.

    Args:
        me: this worker's own report.
        workers: live reports of the deployment's workers; with or without `me`.
        num_shards: S.
        expected_workers: how many workers are to share the shards.

    """
    others = [w for w in workers if w.instance != me.instance]
    held = [{s for s in (*w.shards, *w.wanted_shards) if s < num_shards} for w in others]
    held = [shards for shards in held if shards]
    quota = -(-num_shards // max(expected_workers, len(others) + 1))
    serves_already = bool(held)
    joining = [w for w in others if w.state == "starting" and not w.wanted_shards]
    for worker in sorted([*joining, me], key=lambda w: (w.started, w.instance)):
        taken = _part(held, num_shards, quota, relieve=serves_already)
        if worker.instance == me.instance:
            return tuple(sorted(taken))
        held.append(taken)
    raise AssertionError("unreachable: me is among the joining workers")


def _part(held: Sequence[set[int]], num_shards: int, quota: int, *, relieve: bool) -> set[int]:
    """What falls to one more worker, where the others hold `held`."""
    replicas = [sum(shard in shards for shards in held) for shard in range(num_shards)]
    taken: set[int] = set()
    while len(taken) < num_shards:
        loads = [sum(1 / replicas[shard] for shard in shards) for shards in held]

        def busiest(shard: int, loads: Sequence[float] = loads) -> float:
            """The load of the busiest worker that holds `shard`."""
            return max((load for load, shards in zip(loads, held, strict=True) if shard in shards), default=0.0)

        left = [shard for shard in range(num_shards) if shard not in taken]
        shard = min(left, key=lambda shard: (replicas[shard], -busiest(shard) if relieve else 0, shard))
        if len(taken) >= quota:
            own = sum(1 / replicas[s] for s in taken) + 1 / (replicas[shard] + 1)
            if not relieve or replicas[shard] > min(replicas) or own >= busiest(shard) - ROUNDING:
                break
        replicas[shard] += 1
        taken.add(shard)
    return taken


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
