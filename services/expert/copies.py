"""Which other shards' experts a worker holds copies of, by the monitor's plan: a pure core, told what was heard.

What a plan adds is loaded beside serving, and reported by the plan's epoch; what it needs no more is dropped once every
router has gone over to it and the last calls by the old one are over. The experts of the worker's own shards are none
of this: they stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from services.monitor.messages import ExpertPlan
from shared.status import Status

Key = tuple[int, int]
"""A layer's index in the model, and an expert."""

GRACE_SECONDS = 15.0
"""After the last router has gone over to a plan: until its calls by the one before are over."""


def copies_of(plan: ExpertPlan, shards: Iterable[int], moe_layers: Sequence[int]) -> frozenset[Key]:
    """The experts of other shards that a worker of `shards` needs copies of.

    Args:
        plan: of any number of shards S; its layers are numbers among `moe_layers`.
        shards: that the worker serves.
        moe_layers: indices of the layers that have experts.

    """
    mine = set(shards)
    return frozenset(
        (moe_layers[e.layer], e.expert)
        for e in plan.experts
        if e.expert % plan.num_shards not in mine and any(shard in mine for shard, _ in e.shards)
    )


class Copies:
    """What one worker holds, and by which plan."""

    def __init__(self, moe_layers: Sequence[int], num_experts: int, num_shards: int) -> None:
        self._moe_layers = tuple(moe_layers)
        self._num_experts = num_experts
        self._num_shards = num_shards
        self._plan: ExpertPlan | None = None
        self._last: ExpertPlan | None = None
        """The plan before, whose copies are still there while the new one's load."""
        self._followed_since: float | None = None
        self.held: frozenset[Key] = frozenset()

    def tell(self, plan: ExpertPlan) -> bool:
        """Take note of a plan that was heard; whether it is a new one for this model."""
        if not plan.replaces(self._plan) or not plan.fits(len(self._moe_layers), self._num_experts, self._num_shards):
            return False
        self._last, self._plan, self._followed_since = self._plan, plan, None
        return True

    def epoch(self, shards: Sequence[int]) -> int:
        """Of the newest plan all of whose copies for `shards` are here; 0: of none."""
        for plan in (self._plan, self._last):
            if plan is not None and copies_of(plan, shards, self._moe_layers) <= self.held:
                return plan.epoch
        return 0

    def missing(self, shards: Sequence[int]) -> list[Key]:
        """What is to be loaded, in order."""
        if self._plan is None:
            return []
        return sorted(copies_of(self._plan, shards, self._moe_layers) - self.held)

    def spare(self, shards: Sequence[int], routers: Sequence[Status], now: float) -> frozenset[Key]:
        """What may be dropped.

        Args:
            shards: that the worker serves.
            routers: live reports of the deployment's routers.
            now: seconds, on the clock of all calls.

        """
        if self._plan is None or self.missing(shards):
            return frozenset()
        epoch = self._plan.epoch
        if not routers or any(s.epoch < epoch for s in routers):
            self._followed_since = None
            return frozenset()
        if self._followed_since is None:
            self._followed_since = now
        if now - self._followed_since < GRACE_SECONDS:
            return frozenset()
        return self.held - copies_of(self._plan, shards, self._moe_layers)
