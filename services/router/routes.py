"""Which plan a router dispatches by, and which of its copies are there: a pure core, told what was heard and the time.

A router goes over to a plan when all workers have loaded it. A shard whose workers have not, or not any more, gets none
of what is meant for its copies: that goes home, to shard e mod S, which needs no plan.
"""

from __future__ import annotations

import structlog

from services.monitor.messages import ExpertPlan
from services.router.splitting import Table, table_of
from shared.status import Status

log = structlog.get_logger()

PATIENCE_SECONDS = 60.0
"""So long a plan is not gone over to because a worker has not loaded it; then what it lacks goes home."""


class Routes:
    """Of one router."""

    def __init__(self, deployment: str, num_layers: int, num_experts: int, num_shards: int) -> None:
        self._deployment = deployment
        self._shape = (num_layers, num_experts, num_shards)
        self._plan: ExpertPlan | None = None
        self._next: ExpertPlan | None = None
        self._next_since = 0.0
        self._usable: frozenset[int] = frozenset()
        self._workers: dict[str, tuple[tuple[int, ...], int]] = {}
        """By ready worker: its shards, and the epoch that it has loaded."""
        self.table: Table | None = None
        """Where each part of each expert's tokens goes; None: expert e to shard e mod S."""

    @property
    def epoch(self) -> int:
        """Of the plan that is dispatched by; 0: none."""
        return self._plan.epoch if self._plan else 0

    def tell(self, plan: ExpertPlan, now: float) -> None:
        """Take note of a plan that was heard."""
        if plan.replaces(self._next or self._plan) and plan.fits(*self._shape):
            self._next, self._next_since = plan, now
            self._refresh(now)

    def observe(self, status: Status, now: float) -> None:
        """Take note of a report."""
        if status.service != "expert" or status.deployment != self._deployment:
            return
        known = self._workers.get(status.instance)
        if status.state == "ready":
            self._workers[status.instance] = (status.shards, status.epoch)
        else:
            self._workers.pop(status.instance, None)
        if known != self._workers.get(status.instance):
            self._refresh(now)

    def look(self, live: set[str], now: float) -> None:
        """Forget the workers that are not among `live`, and see to what was waited for."""
        self._workers = {instance: worker for instance, worker in self._workers.items() if instance in live}
        self._refresh(now)

    def _at(self, epoch: int) -> frozenset[int]:
        """The shards all of whose workers have loaded `epoch`."""
        serving = {shard for shards, _ in self._workers.values() for shard in shards}
        behind = {shard for shards, loaded in self._workers.values() if loaded < epoch for shard in shards}
        return frozenset(serving - behind)

    def _refresh(self, now: float) -> None:
        plan = self._plan
        if self._next is not None and (
            len(self._at(self._next.epoch)) == self._shape[2] or now - self._next_since >= PATIENCE_SECONDS
        ):
            plan, self._next = self._next, None
        if plan is None:
            return
        usable = self._at(plan.epoch)
        if plan is not self._plan or usable != self._usable:
            self._plan, self._usable = plan, usable
            self.table = table_of(plan, *self._shape, usable)
            log.info("plan.followed", epoch=plan.epoch, shards=sorted(usable))
