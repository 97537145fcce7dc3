"""Keeps the shards' loads even: watches, and as the leader makes plans, keeps them in JetStream and tells everybody.

Nothing on a request's path waits for it. A plan is told again and again, so that whoever starts later hears it, and
JetStream is needed only to know it after all monitors were away.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import structlog
from nats.aio.msg import Msg

from services.monitor.balance import Policy, decide, imbalance, is_due, loads, split_of
from services.monitor.expert_load import ExpertLoad
from services.monitor.keeper import AUDIT_STREAM, BUCKET
from services.monitor.messages import AuditRecord, Event, ExpertPlan
from services.monitor.observations import Observation
from services.monitor.sight import Sight, leader
from shared import subjects, wire
from shared.bus import Bus
from shared.errors import BadMessageError, MoeError
from shared.instrumentation import BAD_MESSAGES, EVENTS, PLAN_EPOCH, SHARD_IMBALANCE
from shared.jetstream import ConflictError, JetStream
from shared.settings import MonitorSettings

log = structlog.get_logger()

LOOK_SECONDS = 1.0
TELL_SECONDS = 2.0
MEASURE_SECONDS = 10.0
"""The window over which the routers' own figures say how even the shards' loads are."""
RECALL_SECONDS = 10.0
"""So long a monitor that leads waits for JetStream to say what the last plan was, before it goes on without."""
PLAN = "plan."
MAX_DEPLOYMENTS = 256

EVENTS.labels("rebalance")  # from the start, so that a dashboard shows zero and not nothing


def policy(settings: MonitorSettings) -> Policy:
    return Policy(
        threshold=settings.rebalance_threshold,
        extra_experts=settings.rebalance_extra_experts,
        min_tokens=settings.rebalance_min_tokens,
        interval_seconds=settings.rebalance_interval_seconds,
    )


def measured(observation: Observation, deployment: str) -> float | None:
    """The imbalance that the deployment's routers measured in the window; None if they sent nothing."""
    total: npt.NDArray[np.int64] | None = None
    for router in observation.ready("router"):
        rows = router.shard_tokens
        if router.status.deployment != deployment or len({len(row) for row in rows}) != 1:
            continue
        counts = np.array(rows, dtype=np.int64)
        if total is None or total.shape == counts.shape:
            total = counts if total is None else total + counts
    return imbalance(total.astype(np.float64)) if total is not None and total.sum() else None


def routers_epoch(observation: Observation, deployment: str) -> int:
    """Of the plan that all ready routers of `deployment` dispatch by, at least; 0: of none."""
    epochs = [m.status.epoch for m in observation.ready("router") if m.status.deployment == deployment]
    return min(epochs, default=0)


@dataclass
class Balance:
    """What is known of one deployment."""

    load: ExpertLoad
    plan: ExpertPlan | None = None
    revision: int = 0
    """Of the plan in JetStream."""
    recalled: bool = False
    """Whether JetStream was asked for the last plan, and answered."""
    kept: ExpertPlan | None = None
    """What JetStream has, as far as we know."""
    leading_since: float | None = None
    next_try: float = 0.0
    """When a plan may be tried again: after one that was no better, nothing else will be at once."""
    told_at: float = -TELL_SECONDS
    followed_at: float | None = None
    """When all routers had gone over to the plan; the imbalance is measured a window later."""
    unmeasured: bool = False
    """The plan is ours, and what came of it is not said yet."""
    was: float | None = None
    """The imbalance that was measured before it."""


class Rebalancer:
    """One monitor's hand in the plans."""

    def __init__(self, bus: Bus, sight: Sight, settings: MonitorSettings) -> None:
        self._bus = bus
        self._sight = sight
        self._settings = settings
        self._policy = policy(settings)
        self._balances: dict[str, Balance] = {}
        self._jetstream = JetStream(bus)

    async def run(self) -> None:
        """Until cancelled."""
        if self._settings.rebalance == "off":
            return
        await self._bus.watch(subjects.PLAN_ALL, self._on_plan)
        while True:
            try:
                if self._bus.connected:
                    await self._look()
            except Exception:  # a bug of ours must not end the watching
                log.exception("rebalance.failed")
            await asyncio.sleep(LOOK_SECONDS)

    def _on_plan(self, message: Msg) -> None:
        """Another monitor's plan, or our own."""
        try:
            deployment = subjects.parse_plan(message.subject)
            plan = wire.decode(ExpertPlan, message.data)
        except (BadMessageError, ValueError):
            BAD_MESSAGES.labels("plan").inc()
            return
        balance = self._balances.get(deployment)
        if balance is not None and plan.replaces(balance.plan):
            self._adopt(balance, plan)

    @staticmethod
    def _adopt(balance: Balance, plan: ExpertPlan) -> None:
        balance.plan, balance.followed_at, balance.unmeasured, balance.was = plan, None, False, None

    async def _look(self) -> None:
        observation, now = self._sight.look(self._bus, MEASURE_SECONDS), time.monotonic()
        routers = observation.ready("router")
        present = sorted({m.status.deployment for m in routers})[:MAX_DEPLOYMENTS]
        for gone in set(self._balances) - set(present):
            if not any(m.status.deployment == gone for m in observation.instances):
                del self._balances[gone]
        SHARD_IMBALANCE.clear()
        for deployment in present:
            if not subjects.is_token(deployment):
                continue
            balance = self._balances.setdefault(
                deployment, Balance(ExpertLoad(self._settings.rebalance_half_life_seconds))
            )
            mine = [m.status for m in routers if m.status.deployment == deployment]
            balance.load.observe(mine, now)
            self._gauges(deployment, balance, observation, mine[0].num_shards)
            if leader(observation) == self._sight.instance:
                balance.leading_since = balance.leading_since or now
                await self._lead(deployment, balance, observation, mine[0].num_shards)
            else:
                balance.leading_since = None

    def _gauges(self, deployment: str, balance: Balance, observation: Observation, num_shards: int) -> None:
        tokens = balance.load.tokens
        if tokens.size and tokens.sum() and num_shards:
            split = split_of(balance.plan, tokens.shape[0], tokens.shape[1], num_shards)
            SHARD_IMBALANCE.labels(deployment, "expected").set(imbalance(loads(tokens, split)))
        now = measured(observation, deployment)
        if now is not None:
            SHARD_IMBALANCE.labels(deployment, "measured").set(now)
        if balance.plan is not None:
            PLAN_EPOCH.labels(deployment).set(balance.plan.epoch)

    # -- leading -----------------------------------------------------------------------------------------------------

    async def _lead(self, deployment: str, balance: Balance, observation: Observation, num_shards: int) -> None:
        now = time.monotonic()
        if not balance.recalled:
            await self._recall(deployment, balance)
            waited = now - (balance.leading_since or now)
            if not balance.recalled and waited < RECALL_SECONDS:
                return
        tokens = balance.load.tokens
        if tokens.size and num_shards:
            floor = max((m.status.epoch for m in observation.instances if m.status.deployment == deployment), default=0)
            known = (tokens, balance.plan, num_shards, self._policy, time.time())
            if now >= balance.next_try and is_due(*known, floor=floor):
                balance.next_try = now + self._policy.interval_seconds
                plan = await asyncio.to_thread(decide, *known, floor=floor)  # of large models it takes a while
                if plan is not None:
                    await self._make(deployment, balance, plan, measured(observation, deployment))
        if balance.plan is None:
            return
        if balance.kept != balance.plan:
            await self._store(deployment, balance)
        if now - balance.told_at >= TELL_SECONDS:
            balance.told_at = now
            await self._publish(subjects.plan(deployment), wire.encode(balance.plan))
        await self._measure(deployment, balance, observation)

    async def _make(self, deployment: str, balance: Balance, plan: ExpertPlan, was: float | None) -> None:
        before = balance.plan
        self._adopt(balance, plan)
        balance.unmeasured, balance.was, balance.told_at = True, was, -TELL_SECONDS
        await self._store(deployment, balance)
        if balance.plan is not plan:  # another monitor was faster
            return
        measured_text = "" if was is None else f"; measured {was:.2f}"
        log.info("plan.made", deployment=deployment, epoch=plan.epoch, before=before and before.epoch, text=plan.reason)
        await self._say(deployment, "rebalance_planned", f"plan {plan.epoch}: {plan.reason}{measured_text}", plan)

    async def _measure(self, deployment: str, balance: Balance, observation: Observation) -> None:
        """Say what came of the plan, a window after all routers have gone over to it."""
        plan = balance.plan
        if plan is None or not balance.unmeasured:
            return
        now = time.monotonic()
        if routers_epoch(observation, deployment) < plan.epoch:
            balance.followed_at = None
            return
        if balance.followed_at is None:
            balance.followed_at = now
        if now - balance.followed_at < MEASURE_SECONDS + LOOK_SECONDS:
            return
        after = measured(observation, deployment)
        if after is None:
            return
        balance.unmeasured = False
        was = f"{balance.was:.2f}" if balance.was is not None else "unknown"
        text = (
            f"plan {plan.epoch} is followed: imbalance {was} measured before, {after:.2f} since; "
            f"{plan.before:.2f} and {plan.expected:.2f} were expected"
        )
        await self._say(deployment, "rebalance_measured", text, plan)

    # -- keeping and telling -----------------------------------------------------------------------------------------

    async def _recall(self, deployment: str, balance: Balance) -> None:
        """Ask JetStream for the last plan."""
        try:
            bucket = await self._jetstream.bucket(BUCKET)
            if bucket is None:
                return
            entry = await bucket.get(PLAN + deployment)
        except MoeError as error:
            log.debug("plan.not_recalled", reason=error.message)
            return
        balance.recalled = True
        balance.revision, balance.kept = entry.revision if entry else 0, None
        if entry is None:
            return
        try:
            plan = wire.decode(ExpertPlan, entry.value)
        except BadMessageError as error:
            log.warning("plan.damaged", deployment=deployment, reason=error.message)
            return
        balance.kept = plan
        if plan.replaces(balance.plan):
            log.info("plan.recalled", deployment=deployment, epoch=plan.epoch)
            self._adopt(balance, plan)

    async def _store(self, deployment: str, balance: Balance) -> None:
        """Keep the plan; if somebody else has kept another since ours was made, take that."""
        plan = balance.plan
        assert plan is not None  # noqa: S101 - the callers' condition
        try:
            bucket = await self._jetstream.bucket(BUCKET)
            if bucket is None:
                return
            balance.revision = await bucket.put(PLAN + deployment, wire.encode(plan), last=balance.revision)
            balance.kept = plan
        except ConflictError:
            await self._recall(deployment, balance)  # ours, if it is the newer one, is written at the next look
        except MoeError as error:
            log.debug("plan.not_stored", reason=error.message)

    async def _say(self, deployment: str, action: str, text: str, plan: ExpertPlan) -> None:
        """An event for whoever listens, and a record for later."""
        now = time.time()
        log.info("rebalance", action=action, deployment=deployment, text=text)
        EVENTS.labels("rebalance").inc()
        event = Event(kind=action, subject=deployment, text=text, time=now)
        await self._publish(subjects.event("rebalance"), wire.encode(event))
        record = AuditRecord(
            id=f"{deployment}-{plan.epoch}-{action}-{plan.time:.6f}",
            time=now,
            actor=self._sight.instance,
            action=action,
            subject=deployment,
            text=text,
        )
        try:
            stream = self._jetstream.stream(AUDIT_STREAM)
            await stream.append(subjects.AUDIT, wire.encode(record), record_id=record.id)
            EVENTS.labels("audit").inc()
        except MoeError as error:
            log.debug("rebalance.not_recorded", reason=error.message)

    async def _publish(self, subject: str, data: bytes) -> None:
        try:
            await self._bus.publish(subject, data)
        except MoeError as error:  # disconnected: told again soon
            log.debug("rebalance.unpublished", subject=subject, reason=error.message)
