"""Answers `$SRV.PING`, `$SRV.INFO` and `$SRV.STATS`, so that `nats micro ls` shows the fleet (NATS ADR-32).

nats-py's own micro module is not used: stopping one of its endpoints drops queued requests, and it sends the text of
unhandled errors to callers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from datetime import UTC, datetime
from typing import Any

from nats.aio.msg import Msg

from shared import subjects
from shared.bus import Bus
from shared.errors import MoeError

VERSION = "0.1.0"
MOST_PENDING = 64
"""Answers under way; who asks more often than that gets fewer."""
_TYPE = "io.nats.micro.v1"


async def answer(bus: Bus) -> None:
    """Answer discovery for this instance until the bus closes."""
    name, instance = f"openmoe-{bus.service}", bus.instance
    base = {"name": name, "id": instance, "version": VERSION, "metadata": {"service": bus.service}}
    started = datetime.now(UTC).isoformat().replace("+00:00", "Z")

    def endpoint(subject: str) -> str:
        return subject.replace(".", "_")

    def report(verb: str) -> dict[str, Any]:
        if verb == "PING":
            return {**base, "type": f"{_TYPE}.ping_response"}
        if verb == "INFO":
            endpoints = [
                {"name": endpoint(s.subject), "subject": s.subject, "metadata": {}, "queue_group": s.queue_group}
                for s in bus.served
            ]
            description = f"OpenMoE {bus.service} service"
            return {**base, "type": f"{_TYPE}.info_response", "description": description, "endpoints": endpoints}
        stats = [
            {
                "name": endpoint(s.subject),
                "subject": s.subject,
                "num_requests": s.requests,
                "num_errors": s.errors + s.refused,
                "last_error": s.last_error,
                "processing_time": int(s.processing_seconds * 1e9),
                "average_processing_time": int(s.processing_seconds * 1e9 / max(s.requests, 1)),
            }
            for s in bus.served
        ]
        return {**base, "type": f"{_TYPE}.stats_response", "started": started, "endpoints": stats}

    async def send(message: Msg, data: bytes) -> None:
        with contextlib.suppress(MoeError):  # disconnected: whoever asked asks again
            await bus.reply(message, data)

    pending: set[asyncio.Task[None]] = set()

    def on_message(message: Msg) -> None:
        if not message.reply or len(pending) >= MOST_PENDING:
            return
        verb = message.subject.split(".")[1]
        task = asyncio.create_task(send(message, json.dumps(report(verb)).encode()), name="discovery")
        pending.add(task)
        task.add_done_callback(pending.discard)

    for verb in ("PING", "INFO", "STATS"):
        for whom in ((), (bus.service,), (bus.service, instance)):
            await bus.watch(subjects.discovery(verb, *whom), on_message)
