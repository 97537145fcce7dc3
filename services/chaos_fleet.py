"""The processes that `openmoe chaos` strikes: who is ready by its own reports, and the strikes themselves."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

from nats.aio.msg import Msg

from services.chaos_schedule import Kind, Member, Strike, victim
from services.local import Child
from shared import subjects, wire
from shared.errors import BadMessageError
from shared.status import Status

FRESH_SECONDS = 2.5
"""A service reports each second; one that has been silent for so long is not counted on."""
NATS_NAME = "nats-server"


@dataclass
class Struck:
    """A strike that was done. Times are of `time.monotonic`."""

    strike: Strike
    name: str
    index: int
    at: float
    postponed: float
    """Seconds that it waited for a peer to be ready."""
    resumed: float | None = None
    """When a stopped process went on."""
    ready: float | None = None
    """When the process, or the one in its place, first said again that it is ready."""


class Process:
    """One of the stack's processes, and what is known of it."""

    def __init__(self, child: Child, kind: Kind, index: int) -> None:
        self.child, self.kind, self.index = child, kind, index
        self.instance = child.environment.get("INSTANCE", "")
        self.stopped_until: float | None = None
        self.since = 0.0
        """Reports count from then on: when it was last struck, or went on after it."""
        self.killed_pid = 0
        self.heard = 0.0
        self.status: Status | None = None
        self.open: Struck | None = None
        """Its strike from which it has not recovered."""

    @property
    def pid(self) -> int:
        process = self.child.process
        return process.pid if process is not None and process.returncode is None else 0

    @property
    def runs(self) -> bool:
        return self.pid not in {0, self.killed_pid} and self.stopped_until is None

    def is_ready(self, now: float, nats_since: float) -> bool:
        """Whether it has said so lately, and since it or NATS was struck."""
        status = self.status
        return (
            self.runs
            and status is not None
            and (status.pid, status.state) == (self.pid, "ready")
            and self.heard > max(self.since, nats_since, now - FRESH_SECONDS)
        )

    def send(self, number: signal.Signals) -> None:
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class Chaos:
    """Strikes when it is time and a peer can stand in. `tick` does all of it and never waits."""

    def __init__(self, children: Sequence[Child], strikes: Sequence[Strike]) -> None:
        self.processes: list[Process] = []
        counts: dict[str, int] = {}
        for child in children:
            kind = "nats" if child.name == NATS_NAME else child.name.rpartition("-")[0]
            if kind in {"expert", "router", "monitor", "nats"}:
                self.processes.append(Process(child, kind, counts.get(kind, 0)))  # type: ignore[arg-type]
                counts[kind] = counts.get(kind, 0) + 1
        self._by_instance = {p.instance: p for p in self.processes if p.instance}
        self._nats = next(p for p in self.processes if p.kind == "nats")
        self.waiting = list(strikes)
        self.done: list[Struck] = []

    def on_message(self, message: Msg) -> None:
        """A status report."""
        try:
            _, instance = subjects.parse_status(message.subject)
            status = wire.decode(Status, message.data)
        except (BadMessageError, ValueError):
            return
        self._nats.heard = time.monotonic()
        if instance in self._by_instance:
            process = self._by_instance[instance]
            process.status, process.heard = status, self._nats.heard

    def members(self, now: float) -> list[Member]:
        """Everybody, as `services.chaos_schedule` looks at them."""
        nats, found = self._nats, []
        for process in self.processes:
            ready = process.is_ready(now, nats.since) if process is not nats else self._nats_is_ready(now)
            shards = process.status.shards if process.status is not None else ()
            found.append(Member(process.kind, process.index, ready, shards))
        return found

    def _nats_is_ready(self, now: float) -> bool:
        """Whether it runs, and all who are not down themselves were heard over it since."""
        nats = self._nats
        others = [p for p in self.processes if p is not nats and p.open is None and p.runs]
        return nats.runs and nats.heard > nats.since and all(p.is_ready(now, nats.since) for p in others)

    @property
    def settled(self) -> bool:
        """Whether nothing is left to do, and everybody has recovered."""
        return not self.waiting and all(process.open is None for process in self.processes)

    def tick(self, now: float, start: float) -> None:
        """Do what is due at `now`, for a load that began at `start`."""
        self._look(now)
        for strike in [s for s in self.waiting if start + s.at <= now]:
            chosen = victim(strike, self.members(now))
            if chosen is not None:
                self._strike(strike, chosen, now, start)

    def _look(self, now: float) -> None:
        """See who goes on, who was restarted, who has recovered."""
        for process in self.processes:
            if process.stopped_until is not None and now >= process.stopped_until:
                process.send(signal.SIGCONT)
                process.stopped_until, process.since = None, now
                if process.open is not None:
                    process.open.resumed = now
            if process.killed_pid and process.pid not in {0, process.killed_pid}:
                process.killed_pid, process.since = 0, now
        for process, member in zip(self.processes, self.members(now), strict=True):
            if process.open is not None and member.ready:
                process.open.ready = now if process is self._nats else process.heard
                process.open = None

    def _strike(self, strike: Strike, chosen: Member, now: float, start: float) -> None:
        process = next(p for p in self.processes if (p.kind, p.index) == (chosen.kind, chosen.index))
        self.waiting.remove(strike)
        process.open = Struck(strike, process.child.name, chosen.index, now, max(0.0, now - start - strike.at))
        self.done.append(process.open)
        process.since = now
        if strike.action == "kill":
            process.killed_pid = process.pid
            process.send(signal.SIGKILL)
        else:
            process.stopped_until = now + strike.seconds
            process.send(signal.SIGSTOP)

    def release(self) -> None:
        """Let every stopped process go on."""
        for process in self.processes:
            if process.stopped_until is not None:
                process.send(signal.SIGCONT)
                process.stopped_until = None
