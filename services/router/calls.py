"""Calls to the experts: each to one live worker of its shard, hedged when slow, sent elsewhere when that one is lost.

A call is a pure function of its message, so it may be computed twice, and the first answer is as good as any. What may
be sent beside the first sending has two budgets: hedges, and retries, so that an outage is not made worse by them.
Sendings that reached nobody (no responders, no connection, a worker that is leaving) are free.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import structlog

from services.router.latencies import Latencies
from shared import subjects
from shared.bus import BUDGET_MS, REQUEST_ID, Bus, Exchange, NoRespondersError
from shared.bus import deadline as waits_until
from shared.errors import HTTP_STATUS, MoeError
from shared.instrumentation import DISPATCH_HEDGES, DISPATCH_RETRIES, RETRIES_REFUSED
from shared.logs import request_id
from shared.replicas import Replicas
from shared.retry_budget import RetryBudget

log = structlog.get_logger()
T = TypeVar("T")

CALL_SECONDS = 10.0
"""How long a worker may take for a call before it drops it, and before it is sent to the same worker again."""
RETRY_PAUSE_SECONDS = 0.05
WATCH_SECONDS = 0.1
"""A stalled call looks so often for a worker that it has not been sent to."""
MOST_BROKEN_REPLIES = 3
"""So many of a shard's workers may fail at a call before it is given up: a bug of one must not end a request."""
HEDGE_SHARE = 0.05
RETRY_SHARE = 0.2
RETRIES_SAVED = 10.0
RETRY_RESERVE_PER_SECOND = 1.0
GONE = {"no_responders", "draining", "wrong_shard"}
"""Errors that say that this worker does not do this work (any more)."""
FREE = {"no_responders", "bus_unavailable"}
"""Errors of sendings that reached nobody."""
BUSY = {"overloaded", "deadline_exceeded", "bus_unavailable"}
"""Errors of workers that are all right."""


class Message(Protocol):
    """One call's message."""

    @property
    def shard(self) -> int: ...

    @property
    def rows(self) -> int: ...

    @property
    def data(self) -> bytes: ...

    @property
    def moved(self) -> bool:
        """Whether it may be asked of other shards instead: then it is given up as soon as this one cannot."""
        ...


@dataclass(eq=False, slots=True)
class Open:
    """A call under way."""

    number: int
    message: Message
    size: int
    first_sent: float
    due: float = 0.0
    """When something is to be done if no answer has come."""
    resend_at: float = 0.0
    """When it is sent to a worker that has it already."""
    hedge: bool = False
    """What is due is a hedge, and not yet the verdict that it has stalled."""
    stalled: bool = False
    unserved: bool = False
    """Nobody reported that it serves the shard, at some moment since the call has stalled."""
    resent: bool = False
    """It was sent again because it had stalled."""
    latest: int = -1
    """The number of the latest sending that was no hedge."""
    under_way: dict[int, str] = field(default_factory=dict)
    """Sendings without an outcome, and the instance of each; "" is whoever serves the shard."""
    refused_by: set[str] = field(default_factory=set)
    """Since the last pause."""
    reason: str = ""
    """Why it is to be sent again."""
    broken: int = 0
    error: MoeError | None = None
    """Why it was given up."""


class Calls:
    """Asks the workers of each shard. The deadline of a call includes waiting for a shard that has no worker."""

    def __init__(
        self,
        bus: Bus,
        deployment: str,
        workers: Replicas,
        *,
        num_shards: int,
        timeout_seconds: float,
        recovery_seconds: float,
    ) -> None:
        self._bus = bus
        self._deployment = deployment
        self._workers = workers
        self._timeout_seconds = timeout_seconds
        self._recovery_seconds = recovery_seconds
        self._anybody = [subjects.experts(deployment, shard) for shard in range(num_shards)]
        self._somebody: dict[str, str] = {}
        self._latencies = Latencies()
        self._unserved_since: dict[int, float] = {}
        self.retries = RetryBudget(RETRY_SHARE, saved=RETRIES_SAVED, reserve_per_second=RETRY_RESERVE_PER_SECOND)
        self.hedges = RetryBudget(HEDGE_SHARE, most=10.0)
        self._reasons = {reason: DISPATCH_RETRIES.labels(reason) for reason in (*HTTP_STATUS, *GONE, "stalled")}

    async def ask(self, messages: Sequence[Message], read: Callable[[int, bytes], T]) -> list[T | MoeError]:
        """The answer to each message, in their order, or why there is none. All leave at once.

        Args:
            messages: what to ask; of each the shard, the rows and the encoded message.
            read: makes of a message's number and its reply's data an answer; a worker whose reply it refuses with a
                MoeError has failed.

        """
        now = time.monotonic()
        seconds = self._seconds(now)
        deadline = until = now + seconds
        self.retries.called(len(messages))
        self.hedges.called(len(messages))
        headers = {BUDGET_MS: f"{min(CALL_SECONDS, seconds) * 1000:.0f}", REQUEST_ID: request_id.get()}
        with self._bus.exchange(len(messages), headers, read) as exchange:
            calls = []
            for number, message in enumerate(messages):
                call = Open(number, message, Latencies.size(message.rows), now)
                calls.append(call)
                self._first(exchange, call, now)
                until = min(until, call.due)
            if not await exchange.wait(until):
                await self._see_through(exchange, calls, deadline)
            return [self._outcome(exchange, call) for call in calls]

    def _seconds(self, now: float) -> float:
        """How long to go on: as long as the caller waits, if that is known."""
        callers = waits_until.get()
        return self._timeout_seconds if callers is None else min(self._timeout_seconds, max(0.0, callers - now))

    def _outcome(self, exchange: Exchange, call: Open) -> Any:
        if call.number not in exchange.answers:
            assert call.error is not None  # noqa: S101 - _see_through leaves no other
            return call.error
        answer = exchange.answers[call.number]
        if not call.resent:  # what a dead worker cost says nothing about calls
            self._latencies.add(call.size, exchange.arrived[call.number] - call.first_sent)
        self._workers.answered(call.under_way.get(exchange.answered_by[call.number], ""))
        if self._unserved_since:
            self._unserved_since.pop(call.message.shard, None)
        return answer

    # -- sending -----------------------------------------------------------------------------------------------------

    def _first(self, exchange: Exchange, call: Open, now: float) -> None:
        instance = self._send(exchange, call, self._workers.choose(call.message.shard, now), now)
        if self._unserved_since and call.message.shard in self._unserved_since:
            call.stalled = True  # as the calls before it: no need to find out anew
            call.due = now + WATCH_SECONDS
            return
        slow = self._latencies.hedge_after(call.size)
        if slow is not None and instance and self._workers.has_other(call.message.shard, now, instance):
            call.hedge = True
            call.due = now + slow

    def _send(self, exchange: Exchange, call: Open, instance: str | None, now: float) -> str:
        """Send `call` to `instance`, or to whoever serves its shard if that is None."""
        if instance is None:
            subject = self._anybody[call.message.shard]
        else:
            subject = self._somebody.get(instance) or self._subject(instance)
        stalled = self._latencies.stalled_after(call.size)
        call.hedge = call.stalled = False
        call.due = now + stalled
        call.resend_at = now + max(CALL_SECONDS, 2 * stalled)
        call.latest = exchange.send(call.number, subject, call.message.data)
        call.under_way[call.latest] = instance or ""
        return instance or ""

    def _subject(self, instance: str) -> str:
        """The instance's own subject, made once."""
        if len(self._somebody) > 10_000:  # a fleet whose workers come and go for years
            self._somebody.clear()
        subject = self._somebody[instance] = subjects.worker(self._deployment, instance)
        return subject

    def _again(self, exchange: Exchange, call: Open, instance: str | None, now: float) -> None:
        self._reasons[call.reason].inc()
        self._send(exchange, call, instance, now)

    # -- seeing through ----------------------------------------------------------------------------------------------

    async def _see_through(self, exchange: Exchange, calls: list[Open], deadline: float) -> None:
        """Until every call is answered or given up: what fails goes elsewhere, and what is slow too."""
        sent: dict[int, Open] = {}
        left = calls
        while True:
            for call in left:
                sent.update(dict.fromkeys(call.under_way, call))
            now = time.monotonic()
            for sending, error in exchange.take_errors():
                failed = sent.get(sending)  # None: of a call that is answered by now
                if failed is not None and failed.number not in exchange.answers and failed.error is None:
                    self._failed(exchange, failed, sending, error, now)
            for call in left:
                if call.number in exchange.answers or call.error is not None:
                    continue
                if now >= deadline:
                    self._give_up(call, f"its workers do not answer ({call.reason or 'deadline_exceeded'})")
                elif now >= call.due:
                    self._due(exchange, call, now)
            left = [call for call in left if call.number not in exchange.answers and call.error is None]
            if not left:
                return
            await exchange.wait(min(deadline, *(call.due for call in left)))
            await asyncio.sleep(0)  # timers run before the socket is read: an answer may lie there already

    def _failed(self, exchange: Exchange, call: Open, sending: int, error: MoeError, now: float) -> None:
        instance = call.under_way.pop(sending)
        shard = call.message.shard
        call.reason = reason = "no_responders" if isinstance(error, NoRespondersError) else error.code
        if reason == "wrong_shard" and call.message.moved:  # the worker is there, and lacks a copy
            if not call.under_way:
                call.error = error
            return
        if reason in GONE:
            self._workers.gone(instance)
        elif reason not in BUSY:
            call.broken += 1
            log.warning("experts.broken", shard=shard, instance=instance, code=reason, reason=error.message)
            self._workers.failed(instance, now)
            if call.broken >= MOST_BROKEN_REPLIES:
                self._give_up(call, f"its workers cannot compute a call ({reason})")
                return
        if call.under_way:
            return  # another may still answer
        call.refused_by.add(instance)
        other = self._workers.choose(shard, now, call.refused_by)
        if other is not None and reason != "bus_unavailable" and (reason in FREE or self._may_retry(now)):
            self._again(exchange, call, other, now)
            return
        if reason == "no_responders" and self._unserved(call, now):
            return
        call.due = now + RETRY_PAUSE_SECONDS

    def _due(self, exchange: Exchange, call: Open, now: float) -> None:
        shard = call.message.shard
        if not call.under_way:  # a pause is over
            call.due = now + RETRY_PAUSE_SECONDS
            call.refused_by.clear()
            if call.reason in FREE or self._may_retry(now):
                self._again(exchange, call, self._workers.choose(shard, now), now)
            return
        other = self._workers.choose(shard, now, call.under_way.values())
        if call.hedge:
            call.hedge = False
            call.due = call.first_sent + self._latencies.stalled_after(call.size)
            slow = call.under_way.get(call.latest)
            if other is not None and self._workers.has_other(shard, now, slow) and self.hedges.take(now):
                DISPATCH_HEDGES.inc()
                subject = self._somebody.get(other) or self._subject(other)
                sending = exchange.send(call.number, subject, call.message.data)
                call.under_way[sending] = other
            return
        if not call.stalled:
            call.stalled = True
            blamed = call.under_way.get(call.latest, "")  # and no hedge, which has had less time
            self._workers.failed(blamed, now)
            log.warning("experts.stalled", shard=shard, instance=blamed)
        call.due = now + WATCH_SECONDS
        served = self._workers.served(shard, now)
        # It goes to another worker; or to the same, if that was away meanwhile and may have lost it.
        if other is not None or now >= call.resend_at or (served and call.unserved):
            if self._may_retry(now):
                call.reason, call.resent, call.unserved = "stalled", True, False
                self._again(exchange, call, other, now)
        elif not served:
            call.unserved = True
            self._unserved(call, now)

    def _may_retry(self, now: float) -> bool:
        if self.retries.take(now):
            return True
        RETRIES_REFUSED.inc()
        return False

    def _unserved(self, call: Open, now: float) -> bool:
        """Whether the call is given up now, as nobody has served its shard for too long."""
        shard = call.message.shard
        if call.message.moved:
            self._give_up(call, "no worker serves it")
            return True
        since = max(self._unserved_since.setdefault(shard, now), self._workers.last_served(shard))
        if now - since < self._recovery_seconds:
            return False
        self._give_up(call, "no worker serves it")
        return True

    def _give_up(self, call: Open, why: str) -> None:
        shard = call.message.shard
        call.error = MoeError("shard_unavailable", f"expert shard {shard} is unavailable: {why}; try again in a moment")
