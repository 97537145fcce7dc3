"""Takes requests to scale for `openmoe up`: starts more processes of its stack, and drains those that are too many."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

import structlog
from nats.aio.msg import Msg

from services.expert.placement import removable
from services.monitor.messages import ScaleReply, ScaleRequest
from services.monitor.utilisation import SERVICES, Service
from shared import discovery, subjects, wire
from shared.bus import Bus
from shared.errors import MoeError
from shared.status import Fleet

if TYPE_CHECKING:
    from services.local import Child, Stack

log = structlog.get_logger()

MOST_REQUESTS = 16
SPARE_SECONDS = 5.0
"""Beyond GRACE_SECONDS, for a process to end by itself."""


class Supervisor:
    """The hand on the stack's processes. It answers when all is begun, and waits for nobody to be ready or gone."""

    def __init__(self, stack: Stack, bus: Bus) -> None:
        self._stack = stack
        self._bus = bus
        self._fleet = Fleet()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until cancelled."""
        await self._fleet.watch(self._bus)
        await discovery.answer(self._bus)
        await self._bus.serve(
            subjects.control("supervisor", self._bus.instance), self._on_request, capacity=MOST_REQUESTS
        )
        try:
            await asyncio.Event().wait()
        finally:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _on_request(self, message: Msg) -> None:
        request = wire.decode(ScaleRequest, message.data)
        if any(count < 1 for count in request.counts.values()):
            raise MoeError("invalid_request", "a stack needs one of each service at least")
        texts = [self._scale(service, count) for service, count in request.counts.items()]
        if texts:
            sys.stderr.write(f"scaling: {'; '.join(texts)}{f' ({request.reason})' if request.reason else ''}\n")
        counts: dict[str, int] = {service: len(self._stack.staying(service)) for service in SERVICES}
        await self._bus.reply(message, wire.encode(ScaleReply(counts=counts, text="; ".join(texts))))

    def _scale(self, service: Service, count: int) -> str:
        """Begin to have `count` of `service`; what was begun, a sentence."""
        there = self._stack.staying(service)
        if count == len(there):
            return f"there are {count} {service}s already"
        if count > len(there):
            made = self._stack.add(service, count - len(there))
            for child in made:
                self._own(child.keep(lambda: True), f"keep:{child.name}")
            return f"{', '.join(child.name for child in made)} start"
        going = self._leavers(service, there, len(there) - count)
        for child in going:
            child.stopping.set()
            self._own(self._stack.remove(child, self._stack.gateway.grace_seconds + SPARE_SECONDS), f"go:{child.name}")
        short = len(there) - count - len(going)
        kept = f"{short} more must stay, as they alone hold a shard" if short else ""
        went = f"{', '.join(child.name for child in going)} drain and go" if going else ""
        return ", ".join(part for part in (went, kept) if part)

    def _leavers(self, service: Service, there: list[Child], count: int) -> list[Child]:
        """Whom to drain: those that are not ready yet, then the newest that placement can do without."""
        by_instance = {child.instance: child for child in there}
        reports = [s for s in self._fleet.live(service) if s.instance in by_instance and s.state == "ready"]
        ready = {s.instance for s in reports}
        early = [child for child in reversed(there) if child.instance not in ready and ready][:count]
        return [*early, *(by_instance[name] for name in removable(reports, count - len(early)))]

    def _own(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("supervisor.failed", task=task.get_name(), exc_info=error)


async def supervise(stack: Stack) -> None:
    """Take requests for `stack` until cancelled. Without NATS it says so and ends: everything else goes on."""
    try:
        bus = await Bus.connect(stack.nats_url, "supervisor", stack.supervisor)
    except MoeError as error:
        sys.stderr.write(f"scaling is not possible: {error.message}\n")
        return
    try:
        await Supervisor(stack, bus).run()
    except Exception:  # the stack goes on without being scaled
        log.exception("supervisor.failed")
    finally:
        await bus.abort()
