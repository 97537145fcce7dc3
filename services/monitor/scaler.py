"""Keeps the number of workers and routers right: looks, decides, has it done, and tells all of it. The thin shell."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import replace
from typing import Any

import structlog
from nats.aio.msg import Msg

from services.monitor.executors import Executor, choose_executor
from services.monitor.keeper import AUDIT_STREAM
from services.monitor.messages import AuditRecord, MetricReading, ScaleReply, ScaleRequest, ScalingEvent
from services.monitor.observations import Observation
from services.monitor.rules import Reading
from services.monitor.scaling import Decision, Limits, ScalingState, by_hand, decide, scaling_ineffective
from services.monitor.sight import Sight, leader
from services.monitor.utilisation import SERVICES, Service, Targets
from shared import subjects, wire
from shared.bus import Bus
from shared.errors import MoeError
from shared.instrumentation import EVENTS, SCALING_DECISIONS, SCALING_INSTANCES
from shared.jetstream import JetStream
from shared.settings import MonitorSettings

log = structlog.get_logger()

LOOK_SECONDS = 1.0
KINDS = {"up": "scale_up", "down": "scale_down", "hold": "scaling_held"}
MOST_REQUESTS = 16

EVENTS.labels("scaling")  # from the start, so that a dashboard shows zero and not nothing


def limits(settings: MonitorSettings, service: Service) -> Limits:
    """The operator's limits for `service`."""
    least, most = (
        (settings.min_workers, settings.max_workers)
        if service == "expert"
        else (settings.min_routers, settings.max_routers)
    )
    return Limits(
        least=least,
        most=most,
        up_at=settings.scale_up_at,
        down_at=settings.scale_down_at,
        tolerance=settings.scaling_tolerance,
        cooldown=settings.scaling_cooldown_seconds,
        window=settings.scaling_window_seconds,
        attempts=settings.scaling_attempts,
        targets=Targets(settings.scaling_latency, settings.scaling_latency_ms / 1000, settings.scaling_queue_target),
    )


class Scaler:
    """One monitor's scaling; it acts only while this monitor is the one that does."""

    def __init__(self, settings: MonitorSettings, bus: Bus, sight: Sight) -> None:
        """Decide nothing yet.

        Raises:
            StartError: SCALING_EXECUTOR needs something that is not there.

        """
        self._settings = settings
        self._bus = bus
        self._sight = sight
        self._executor: Executor = choose_executor(settings, bus)
        self._limits = {service: limits(settings, service) for service in SERVICES}
        self._states = {service: ScalingState() for service in SERVICES}
        self._told: dict[tuple[Any, ...], float] = {}
        self._last: dict[Service, tuple[Any, ...]] = {}
        self._acting = asyncio.Lock()

    async def run(self) -> None:
        """Look each second, until cancelled."""
        await self._bus.serve(subjects.control("monitor", self._bus.instance), self._on_request, capacity=MOST_REQUESTS)
        try:
            while True:
                try:
                    await self._look()
                except Exception:  # a bug of ours must not end the looking
                    log.exception("scaling.failed")
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            await self._executor.close()

    def readings(self) -> list[Reading]:
        """For the alert scaling_ineffective."""
        return [scaling_ineffective(service, self._states[service], self._limits[service]) for service in SERVICES]

    def _observe(self) -> Observation:
        """What is seen of the model that this monitor is for, and of the monitors."""
        seen = self._sight.look(self._bus, self._settings.scaling_look_seconds)
        mine = (m for m in seen.instances if m.service == "monitor" or m.status.model == self._settings.model_name)
        return replace(seen, instances=tuple(mine))

    async def _look(self) -> None:
        seen = self._observe()
        if leader(seen) != self._bus.instance:
            self._states = {service: ScalingState() for service in SERVICES}  # whoever begins to act begins anew
            return
        for service in SERVICES:
            if not seen.of(service, fresh=False):  # a fleet that has none is somebody else's, or not there yet
                continue
            async with self._acting:
                decision, self._states[service] = decide(
                    service, self._observe(), self._states[service], self._limits[service]
                )
                SCALING_INSTANCES.labels(service, "current").set(decision.current)
                SCALING_INSTANCES.labels(service, "wanted").set(decision.wanted)
                SCALING_INSTANCES.labels(service, "desired").set(decision.desired)
                if decision.action != "hold":
                    await self._carry_out(decision)
                elif decision.wanted != decision.current and self._is_news(decision):
                    await self._tell(self._event(decision))

    async def _carry_out(self, decision: Decision) -> None:
        outcome, done = await self._have(decision.service, decision.current, decision.desired, decision.text)
        event = self._event(decision, outcome)
        await self._tell(event)
        if done:
            await self._record(event)

    async def _have(self, service: Service, current: int, count: int, reason: str) -> tuple[str, bool]:
        """What came of asking for `count`, and whether anything was changed."""
        if self._settings.scaling_dry_run:
            return "dry run: nothing was changed (SCALING_DRY_RUN)", False
        if not self._executor.acts:
            return "nothing was changed: SCALING_EXECUTOR is none", False
        try:
            there = (await self._executor.counts()).get(service)
            if there is not None and (there >= count if count > current else there <= count):
                return f"{there} were asked for already", False
            return await self._executor.scale(service, count, reason), True
        except MoeError as error:
            log.warning("scaling.not_done", service=service, count=count, code=error.code, reason=error.message)
            return f"failed: {error.message}", False

    def _is_news(self, decision: Decision) -> bool:
        """Whether something else was told last, and not this within a cooldown: rules hold back for many looks."""
        now = decision.time
        self._told = {k: at for k, at in self._told.items() if now - at < self._settings.scaling_cooldown_seconds}
        key = (decision.service, decision.current, decision.wanted > decision.current, *(h.rule for h in decision.held))
        if key == self._last.get(decision.service) or key in self._told:
            return False
        self._told[key], self._last[decision.service] = now, key
        return True

    # -- telling -----------------------------------------------------------------------------------------------------

    def _event(self, decision: Decision, outcome: str = "") -> ScalingEvent:
        return ScalingEvent(
            kind=KINDS[decision.action],  # type: ignore[arg-type]
            subject=decision.service,
            text=decision.text,
            time=decision.time,
            actor=self._bus.instance,
            current=decision.current,
            wanted=decision.wanted,
            desired=decision.desired,
            winner=decision.winner or "",
            metrics=tuple(
                MetricReading(
                    metric=r.usage.metric,
                    usage=None if r.usage.value is None else round(r.usage.value, 4),
                    wanted=r.wanted,
                    text=r.usage.text,
                )
                for r in decision.readings
            ),
            held=tuple((h.rule, h.text) for h in decision.held),
            dry_run=self._settings.scaling_dry_run,
            outcome=outcome,
        )

    async def _tell(self, event: ScalingEvent) -> None:
        log.info(
            "scaling.decided",
            decision=event.kind,
            scaled=event.subject,
            current=event.current,
            wanted=event.wanted,
            desired=event.desired,
            winner=event.winner,
            metrics={m.metric: (m.usage, m.wanted) for m in event.metrics},
            held=[rule for rule, _ in event.held],
            by_hand=event.by_hand,
            outcome=event.outcome,
            text=event.text,
        )
        SCALING_DECISIONS.labels(event.subject, event.kind).inc()
        EVENTS.labels("scaling").inc()
        try:
            await self._bus.publish(subjects.event("scaling"), wire.encode(event))
        except MoeError as error:
            log.warning("scaling.unpublished", reason=error.message)

    async def _record(self, event: ScalingEvent) -> None:
        """Add what was changed to the audit stream, if there is one; the event says the same."""
        record = AuditRecord(
            id=f"{event.time:.6f}-{event.actor}-scaled-{event.subject}",
            time=event.time,
            actor=event.actor,
            action="scaled",
            subject=event.subject,
            text=f"{event.text}; {event.outcome}",
        )
        with contextlib.suppress(MoeError):
            stream = JetStream(self._bus).stream(AUDIT_STREAM)
            await stream.append(subjects.AUDIT, wire.encode(record), record_id=record.id)

    # -- by hand -----------------------------------------------------------------------------------------------------

    async def _on_request(self, message: Msg) -> None:
        request = wire.decode(ScaleRequest, message.data)
        async with self._acting:
            reply = await self._scale_by_hand(request)
        await self._bus.reply(message, wire.encode(reply))

    async def _scale_by_hand(self, request: ScaleRequest) -> ScaleReply:
        """Have what an operator asks for.

        Raises:
            MoeError: `scaling_failed`: another monitor acts, or it cannot be done. `invalid_request`: out of bounds.

        """
        seen = self._observe()
        chief = leader(seen)
        if chief != self._bus.instance:
            raise MoeError("scaling_failed", f"{chief or 'no monitor'} acts, not {self._bus.instance}; ask again")
        for service, count in request.counts.items():
            least, most = self._limits[service].least, self._limits[service].most
            if not least <= count <= most:
                raise MoeError("invalid_request", f"{service}={count} is not within the bounds, {least} to {most}")
        texts = []
        for service, count in request.counts.items():
            current = len([m for m in seen.of(service) if m.status.state != "draining"])
            reason = f"{count} {service}s were asked for by hand" + (f": {request.reason}" if request.reason else "")
            if self._settings.scaling_dry_run:
                outcome = "dry run: nothing was changed (SCALING_DRY_RUN)"
            else:
                outcome = await self._executor.scale(service, count, reason)
            self._states[service] = by_hand(self._states[service], time.time(), count)
            event = ScalingEvent(
                kind="scale_up" if count > current else "scale_down" if count < current else "scaling_held",
                subject=service,
                text=reason,
                time=time.time(),
                actor=self._bus.instance,
                current=current,
                wanted=count,
                desired=count,
                by_hand=True,
                dry_run=self._settings.scaling_dry_run,
                outcome=outcome,
            )
            await self._tell(event)
            await self._record(event)
            texts.append(outcome)
        counts: dict[str, int] = {s: len([m for m in seen.of(s) if m.status.state != "draining"]) for s in SERVICES}
        if self._executor.acts:
            counts |= {str(s): count for s, count in (await self._executor.counts()).items()}
        return ScaleReply(counts=counts, text="; ".join(texts) or "nothing was asked for")
