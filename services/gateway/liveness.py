"""Which streams wait for a router that is no more: silent ones are asked about, all of a router's by one message.

A process that was killed is known at once (NATS has nobody to hand the question to), one that was stopped by its
silence, and a generation that its router lost by the answer. A stream so stands still for less than two seconds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import structlog

from services.router.messages import CheckReply, CheckRequest
from shared import subjects, wire
from shared.bus import Bus, NoRespondersError
from shared.errors import MoeError
from shared.replicas import Replicas

log = structlog.get_logger()

SILENT_SECONDS = 0.75
"""After so long without a chunk a stream is asked about, and again after each answer that it goes on."""
ANSWER_SECONDS = 0.75
PING_SECONDS = 0.25
REPORT_SECONDS = 1.25
"""Routers report each second: one that has just done so is busy, not lost."""
LOOK_SECONDS = 0.25


class Stream(Protocol):
    """What chunks come by."""

    @property
    def unread(self) -> bool:
        """Whether something has come that nobody has taken yet: it is the reader who is slow, not the router."""
        ...

    def fail(self, error: MoeError) -> None:
        """Have the reader find `error` after what it has not read yet."""
        ...


@dataclass(eq=False, slots=True)
class Watched:
    """A stream that a router is to fill."""

    id: str
    instance: str
    stream: Stream
    """Is told, once at most, that nothing more will come."""
    last_sign: float
    """When the last chunk came, or the last answer that it goes on."""
    tokens: int = 0
    """New tokens that have arrived."""


def silent(streams: Iterable[Watched], now: float) -> dict[str, list[Watched]]:
    """The streams that are to be asked about, by router."""
    found: dict[str, list[Watched]] = {}
    for stream in streams:
        if now - stream.last_sign >= SILENT_SECONDS and not stream.stream.unread:
            found.setdefault(stream.instance, []).append(stream)
    return found


class Liveness:
    """Watches streams, and only while there are any."""

    def __init__(self, bus: Bus, routers: Replicas) -> None:
        self._bus = bus
        self._routers = routers
        self._streams: dict[Watched, None] = {}  # not a set: in the order in which they came, always the same
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._looking: asyncio.Task[None] | None = None

    def add(self, stream: Watched) -> None:
        self._streams[stream] = None
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look(), name="liveness")

    def remove(self, stream: Watched) -> None:
        self._streams.pop(stream, None)

    async def _look(self) -> None:
        while self._streams:
            await asyncio.sleep(LOOK_SECONDS)
            for instance, streams in silent(self._streams, time.monotonic()).items():
                if instance not in self._asking:
                    task = asyncio.create_task(self._ask(instance, streams), name=f"liveness:{instance}")
                    self._asking[instance] = task
                    task.add_done_callback(lambda _, instance=instance: self._asking.pop(instance, None))  # type: ignore[misc]

    async def _ask(self, instance: str, streams: list[Watched]) -> None:
        asked = time.monotonic()
        try:
            known = await self.generations(instance, [stream.id for stream in streams])
        except MoeError as error:
            if error.code == "router_unavailable":
                # What has become silent meanwhile need not be asked about by itself: that would take as long again.
                for stream in [s for s in self._streams if s.instance == instance and s.last_sign <= asked]:
                    self._lose(stream, error)
            return
        now = time.monotonic()
        for stream in streams:
            if stream.stream.unread:
                continue
            if stream.id not in known or known[stream.id] > stream.tokens:
                self._lose(stream, MoeError("chunk_lost", f"router {instance} has lost the generation"))
            else:
                stream.last_sign = max(stream.last_sign, now)

    def _lose(self, stream: Watched, error: MoeError) -> None:
        if stream in self._streams:
            del self._streams[stream]
            stream.stream.fail(error)

    async def generations(self, instance: str, ids: list[str]) -> dict[str, int]:
        """Those of the generations `ids` that the router `instance` has, and how many new tokens each has.

        Raises:
            MoeError: `router_unavailable`, if the router is gone or silent; another code if that cannot be said, as
                NATS itself does not answer.

        """
        with self._bus.exchange(1) as exchange:
            exchange.send(0, subjects.control("router", instance), wire.encode(CheckRequest(ids=ids)))
            await exchange.wait(time.monotonic() + ANSWER_SECONDS)
            for _, error in exchange.take_errors():
                if isinstance(error, NoRespondersError):
                    raise MoeError("router_unavailable", f"router {instance} is gone")
                raise error
            if not exchange.complete:
                await self._bus.flush(PING_SECONDS)  # whatever has reached NATS by now comes before its PONG
            if exchange.complete:
                return wire.decode(CheckReply, exchange.answers[0]).tokens
        if time.monotonic() - self._routers.heard(instance) < REPORT_SECONDS:
            raise MoeError("deadline_exceeded", f"router {instance} reports, but is slow to answer")
        raise MoeError("router_unavailable", f"router {instance} does not answer")

    async def close(self) -> None:
        """End what is under way."""
        tasks = [task for task in (self._looking, *self._asking.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
