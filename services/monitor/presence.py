"""Asks instances whose report is overdue whether they live, as expert workers ask each other.

A late report proves nothing; NATS' answer that nobody listens there does, at once.
"""

from __future__ import annotations

import asyncio
import time

import structlog

from services.expert.watch import Watch
from shared import subjects
from shared.bus import Bus, NoRespondersError
from shared.errors import MoeError
from shared.status import Fleet

log = structlog.get_logger()

SERVICES = ("expert", "gateway", "monitor", "router")
DOUBT_SECONDS = 1.15
"""A little before the workers do, so that an alert comes before what they do about it; reports come each second."""
LOOK_SECONDS = 0.1
PROBE_SECONDS = 2.0


class Presence:
    """Who is known to be lost."""

    def __init__(self, bus: Bus, fleet: Fleet) -> None:
        self._bus = bus
        self._fleet = fleet
        self._watches = {service: Watch(bus.instance, doubt_seconds=DOUBT_SECONDS) for service in SERVICES}
        self._before: dict[tuple[str, str], str] = {}
        self.changed = asyncio.Event()
        """Set whenever somebody is lost or found again."""

    def lost(self) -> dict[tuple[str, str], str]:
        """By (service, instance): `gone` or `stalled`."""
        return {(service, i): why for service, watch in self._watches.items() for i, why in watch.lost().items()}

    async def run(self) -> None:
        """Look and ask, until cancelled."""
        async with asyncio.TaskGroup() as probes:
            while True:
                try:
                    for service, watch in self._watches.items():
                        for instance in self._look(service, watch):
                            whose = self._bus.service if instance == self._bus.instance else service
                            probes.create_task(self._probe(watch, whose, instance), name=f"probe:{instance}")
                except Exception:  # one look that goes wrong must not be the last
                    log.exception("presence.failed")
                self._compare()
                await asyncio.sleep(LOOK_SECONDS)

    def _look(self, service: str, watch: Watch) -> list[str]:
        me = (self._bus.service, self._bus.instance)
        own = [(heard, s) for heard, s in self._fleet.heard(me[0]) if s.instance == me[1]]
        others = [(heard, s) for heard, s in self._fleet.heard(service) if s.instance != me[1]]
        return watch.look(time.monotonic(), [*own, *others], connection=self._bus.connection)

    def _compare(self) -> None:
        now = self.lost()
        if now != self._before:
            self.changed.set()
        self._before = now

    async def _probe(self, watch: Watch, service: str, instance: str) -> None:
        try:
            await self._bus.request(subjects.discovery("PING", service, instance), b"", timeout=PROBE_SECONDS)
        except NoRespondersError:
            watch.absent(instance)
        except MoeError:
            watch.unanswered(instance)
        else:
            watch.answered(instance, time.monotonic())
        self._compare()
