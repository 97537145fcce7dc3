"""Which of the other workers are lost, and which shards with them: a pure core, told what was heard and the time.

A late report proves nothing on a busy machine, so a worker whose report is overdue is doubted and asked (a discovery
PING). NATS knows at once that nobody listens any more (SIGKILL, a crash, a host that closed the connection): *gone*. No
answer, while our own comes back by the same way: *stalled* (SIGSTOP, a host without power). Any answer: it lives.
(The asking is SWIM's: Das, Gupta, Motivala 2002; NATS takes the place of the indirect probes.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from services.expert.placement import shards_to_take_over
from shared.status import Status

DOUBT_SECONDS = 1.3
"""A worker is asked when its last sign of life is older; reports come each second."""
ANSWER_SECONDS = 0.5
SILENT_SECONDS = 2.0
"""Who has not answered for ANSWER_SECONDS, and has given no sign for so long, is stalled."""
UNCLAIMED_SECONDS = 3.0
"""A shard that nobody claims, and nobody is known to have lost: its worker may be starting."""
DEAF_SECONDS = 2.0
"""If our own report has not come back for so long, we hear nobody, which says nothing about them."""
RETURN_SECONDS = 5.0
"""After a break of our connection, the others have so long to come back over theirs."""
LATE_SECONDS = 0.5
"""A look that comes so much later than the one before: answers may lie unread."""
FORGET_SECONDS = 60.0

Reason = Literal["gone", "stalled", "draining", "unclaimed"]


@dataclass
class _Peer:
    status: Status
    heard: float
    """When its last report came."""
    sign: float
    """When it last gave a sign of life: a report or an answer."""
    asked: float | None = None
    """Since when a probe is outstanding."""
    proven: float | None = None
    """Since when we know that what left then has come through: something of our own did."""
    spared_until: float = -math.inf
    verdict: Literal["", "gone", "stalled"] = ""


@dataclass(frozen=True)
class Loss:
    """A shard to take over."""

    shard: int
    reason: Reason
    instance: str
    """Who had it; nothing, if nobody is known."""
    sign: float
    """When that worker last gave a sign of life; without one, since when the shard has been unclaimed."""


class Watch:
    """What one worker knows of its deployment's other workers, or a monitor of the instances of a service."""

    def __init__(self, instance: str, *, doubt_seconds: float = DOUBT_SECONDS) -> None:
        self._me = instance
        self._doubt_seconds = doubt_seconds
        self._own_sign = -math.inf
        self._own_asked: float | None = None
        self._own_heard = -math.inf
        self._peers: dict[str, _Peer] = {}
        self._unclaimed: dict[int, float] = {}
        self._looked = -math.inf
        self._connection: int | None = None

    def look(self, now: float, reports: Iterable[tuple[float, Status]], *, connection: int | None) -> list[str]:
        """Take note of what was heard, judge, and say whom to ask; each must come back to one of the three below.

        Args:
            now: seconds, on the clock of everything here.
            reports: (when it came, the last report) of each worker of the deployment, this one's too.
            connection: the number of our connection to NATS, another after each reconnect; None while there is none.

        """
        late, self._looked = now - self._looked > LATE_SECONDS, now
        for heard, status in reports:
            self._hear(heard, status)
        self._peers = {i: p for i, p in self._peers.items() if now - p.sign < FORGET_SECONDS}
        if connection is not None and connection != self._connection:
            for peer in self._peers.values():
                peer.spared_until = now + RETURN_SECONDS
        self._connection = connection
        if connection is None or now - self._own_heard > DEAF_SECONDS:
            self._unclaimed = {}
            return []
        ask = []
        for instance, peer in self._peers.items():
            if late:
                peer.proven = None
            if peer.verdict or now < peer.spared_until or now - peer.sign <= self._doubt_seconds:
                continue
            if peer.asked is None:
                peer.asked, peer.proven = now, None
                ask.append(instance)
            elif peer.proven is None:
                peer.proven = now if self._own_sign > peer.asked else None
            elif peer.sign < peer.asked and now - peer.proven >= ANSWER_SECONDS and now - peer.sign > SILENT_SECONDS:
                peer.verdict = "stalled"
        if ask and self._own_asked is None:
            self._own_asked = now
            ask.insert(0, self._me)
        return ask

    def _hear(self, heard: float, status: Status) -> None:
        if status.instance == self._me:
            self._own_heard = max(self._own_heard, heard)
            self._own_sign = max(self._own_sign, heard)
            return
        peer = self._peers.get(status.instance)
        if peer is None:
            self._peers[status.instance] = _Peer(status, heard, heard)
        elif heard > peer.heard:
            peer.status, peer.heard, peer.sign = status, heard, max(peer.sign, heard)
            peer.spared_until, peer.verdict = -math.inf, ""

    def answered(self, instance: str, now: float) -> None:
        if instance == self._me:
            self._own_sign, self._own_asked = now, None
        elif peer := self._peers.get(instance):
            peer.sign, peer.asked, peer.verdict = now, None, ""

    def absent(self, instance: str) -> None:
        """The server says that nobody answers to this name."""
        if instance == self._me:
            self._own_asked = None
        elif peer := self._peers.get(instance):
            if peer.asked is not None and peer.sign < peer.asked and self._connection is not None:
                peer.verdict = "gone"
            peer.asked = None

    def unanswered(self, instance: str) -> None:
        """The probe came to nothing: too late, or the connection broke."""
        if instance == self._me:
            self._own_asked = None
        elif peer := self._peers.get(instance):
            peer.asked = None

    def workers(self) -> list[Status]:
        """The last reports of those who live and stay: neither lost nor draining."""
        return [p.status for p in self._peers.values() if not p.verdict and p.status.state != "draining"]

    def lost(self) -> dict[str, str]:
        """Those that are lost, each with `gone` or `stalled`."""
        return {instance: peer.verdict for instance, peer in self._peers.items() if peer.verdict}

    def losses(self, me: Status, num_shards: int, now: float, *, needed: bool) -> list[Loss]:
        """Shards that `me` should take over now.

        Args:
            me: this worker's own report.
            num_shards: S.
            now: seconds, on the clock of everything here.
            needed: whether somebody asks for experts, so that a worker that drains needs a successor at once.

        """
        mine = shards_to_take_over(me, self.workers(), num_shards)
        self._unclaimed = {shard: self._unclaimed.get(shard, now) for shard in mine}
        due = []
        for shard, since in self._unclaimed.items():
            holders = [p for p in self._peers.values() if shard in (*p.status.shards, *p.status.wanted_shards)]
            last = max(holders, key=lambda p: p.sign, default=None)
            if last is None:
                loss = Loss(shard, "unclaimed", "", since)
            else:
                loss = Loss(shard, last.verdict or "draining", last.status.instance, last.sign)
            at_once = loss.reason in ("gone", "stalled") or (loss.reason == "draining" and needed)
            if at_once or now - since >= UNCLAIMED_SECONDS:
                due.append(loss)
        return due
