"""Alerts at work: looks each second, and at once when somebody is lost; tells the bus, the log and the webhook.

Every monitor comes to the same alerts and shows them on /metrics; only the one that acts tells anybody. What it has
told is kept (keeper.py), so that the next one neither says it again nor forgets to say that it is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable

import structlog

from services.monitor.absences import absences
from services.monitor.alerts import State, adopted, key_of, step, telling
from services.monitor.conditions import figures
from services.monitor.keeper import Keeper
from services.monitor.messages import Event, OpenAlert
from services.monitor.observations import Observation
from services.monitor.presence import Presence
from services.monitor.rules import RULES, Reading
from services.monitor.sight import Sight, leader
from services.monitor.webhook import Webhook
from shared import subjects, wire
from shared.bus import Bus
from shared.errors import MoeError
from shared.instrumentation import ALERTS, EVENTS
from shared.settings import MonitorSettings

log = structlog.get_logger()

LOOK_SECONDS = 1.0
LATE_SECONDS = 3.0
"""A look that comes so much later than the one before: reports may lie unread."""
RETURN_SECONDS = 5.0
"""After a break of our connection, the others have at least so long to come back over theirs."""

EVENTS.labels("alert")  # from the start, so that a dashboard shows zero and not nothing


class Hearing:
    """Since when this monitor hears others without a break: before that, silence says nothing of them."""

    def __init__(self, settle_seconds: float) -> None:
        self._settle_seconds = max(settle_seconds, RETURN_SECONDS)
        self._since = self._looked = -float("inf")
        self._connection: int | None = None

    def judge(self, now: float, connection: int | None, *, own_report_fresh: bool) -> bool:
        """Whether silence says something.

        Args:
            now: seconds on the monotonic clock.
            connection: the number of the connection to NATS; None while there is none.
            own_report_fresh: whether our own report comes back.

        """
        unbroken = connection is not None and connection == self._connection and own_report_fresh
        if not unbroken or now - self._looked > LATE_SECONDS:
            self._since = now
        self._connection, self._looked = connection, now
        return unbroken and now - self._since >= self._settle_seconds


class Alerting:
    """One monitor's alerts."""

    def __init__(
        self,
        settings: MonitorSettings,
        bus: Bus,
        sight: Sight,
        presence: Presence,
        keeper: Keeper,
        webhook: Webhook | None,
        more: Callable[[], Iterable[Reading]] = tuple,
    ) -> None:
        """Know of no alert yet, and let `keeper` keep what will be told.

        Args:
            settings: the thresholds.
            bus: where events go.
            sight: the fleet.
            presence: who is lost.
            keeper: keeps what was told.
            webhook: who is told beside the bus.
            more: readings that other parts of the monitor have at each look.

        """
        self._settings = settings
        self._bus = bus
        self._sight = sight
        self._presence = presence
        self._keeper = keeper
        self._webhook = webhook
        self._more = more
        self._hearing = Hearing(settings.stale_seconds)
        self._told: tuple[OpenAlert, ...] = ()
        self._adopted = False
        """Whether we act, and know what was told before us."""
        self._acted = False
        """Whether we act without knowing that."""
        self.state: State = {}
        keeper.told = lambda: self._told if self._adopted else None

    async def run(self) -> None:
        """Look and tell, until cancelled."""
        self._show()
        while True:
            try:
                await self._look()
            except Exception:  # one look that goes wrong must not be the last
                log.exception("alerts.failed")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._presence.changed.wait()
            self._presence.changed.clear()

    async def _look(self) -> None:
        seen = self._sight.look(self._bus, self._settings.alert_window_seconds)
        me = [m for m in seen.of("monitor") if m.instance == self._sight.instance]
        if not self._hearing.judge(time.monotonic(), self._bus.connection, own_report_fresh=bool(me)):
            return
        acts = leader(seen) == self._sight.instance
        if acts and not self._adopted and not await self._adopt(seen.now):
            return
        if not acts:
            self._adopted = self._acted = False
        await self._tell(seen, acts=acts)

    async def _adopt(self, now: float) -> bool:
        """Learn what was told before us; whether we may act."""
        kept = await self._keeper.open_alerts()
        if kept is None:
            self._acted = self._acted or self._keeper.failing
            return self._acted
        known = {key_of(each) for each in kept}
        # What we only saw another one tell, and it has not kept, it may not have told: we do.
        mine = tuple(each for each in self._told if key_of(each) not in known) if self._acted else ()
        self._told = (*kept, *mine)
        self.state = adopted(self.state, self._told, now)
        self._adopted, self._acted = True, False
        return True

    async def _tell(self, seen: Observation, *, acts: bool) -> None:
        opened = {key: (a.reading.deployment, a.since) for key, a in self.state.items() if a.firing}
        lost = absences(seen, self._presence.lost(), self._settings, opened)
        readings = [*figures(seen, self._settings), *lost, *self._more()]
        self.state, closed = step(self.state, readings, seen.now, self._settings)
        self._show()
        said = telling(self._told, self.state, closed, seen.now, self._settings.alert_repeat_seconds)
        if acts:
            try:
                for event in said.events:
                    await self._publish(event)
            except MoeError as error:  # the next look says it again
                log.warning("alert.unpublished", reason=error.message)
                return
            if self._webhook is not None:
                for notification in said.notifications:
                    self._webhook.offer(notification)
        self._told = said.told

    async def _publish(self, event: Event) -> None:
        await self._bus.publish(subjects.event("alert"), wire.encode(event))
        EVENTS.labels("alert").inc()
        log.warning(
            "alert",
            kind=event.kind,
            subject=event.subject,
            state=event.state,
            severity=event.severity,
            action=event.action,
            value=event.value,
            threshold=event.threshold,
            text=event.text,
        )

    def _show(self) -> None:
        """The gauges, which show zero and not nothing where all is well."""
        for rule, facts in RULES.items():
            mine = [alert for alert in self.state.values() if alert.reading.rule == rule]
            firing = sum(alert.firing for alert in mine)
            ALERTS.labels(rule, facts.severity, "firing").set(firing)
            ALERTS.labels(rule, facts.severity, "pending").set(len(mine) - firing)
