"""SCALING_EXECUTOR=local: the supervisor of `openmoe up` starts and drains processes of its own."""

from __future__ import annotations

from services.monitor.messages import ScaleReply, ScaleRequest
from services.monitor.utilisation import SERVICES, Service
from shared import subjects, wire
from shared.bus import Bus

ANSWER_SECONDS = 5.0
"""The supervisor answers once processes are started or told to drain, and waits for neither."""


class LocalExecutor:
    """Asks the supervisor over NATS."""

    acts = True

    def __init__(self, bus: Bus, supervisor: str) -> None:
        self._bus = bus
        self._subject = subjects.control("supervisor", supervisor)

    async def counts(self) -> dict[Service, int]:
        found = (await self._ask(ScaleRequest(counts={}))).counts
        return {service: found[service] for service in SERVICES if service in found}

    async def scale(self, service: Service, count: int, reason: str) -> str:
        return (await self._ask(ScaleRequest(counts={service: count}, reason=reason[:1024]))).text

    async def close(self) -> None:
        return

    async def _ask(self, request: ScaleRequest) -> ScaleReply:
        data = await self._bus.request(self._subject, wire.encode(request), timeout=ANSWER_SECONDS)
        return wire.decode(ScaleReply, data)
