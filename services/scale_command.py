"""`openmoe scale expert=4`: asks the monitor that acts or, where none is, the supervisor of `openmoe up`."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Sequence

from services.monitor.messages import ScaleReply, ScaleRequest
from services.monitor.sight import acting
from services.monitor.utilisation import SERVICES, Service
from shared import subjects, wire
from shared.bus import Bus
from shared.errors import MoeError, StartError
from shared.status import STATUS_INTERVAL_SECONDS, Fleet

CONNECT_SECONDS = 3
LISTEN_SECONDS = 1.5 * STATUS_INTERVAL_SECONDS
PING_SECONDS = 1.0
_COUNT = re.compile(r"(?P<service>[a-z]+)=(?P<count>\d{1,4})")


class ScalingRefusedError(Exception):
    """It was not done; the text says why."""


def parse(words: Sequence[str]) -> dict[Service, int]:
    """`expert=4`, `router=2` as a mapping.

    Raises:
        StartError: one of them is something else, or named twice.

    """
    counts: dict[Service, int] = {}
    for word in words:
        match = _COUNT.fullmatch(word)
        named = [s for s in SERVICES if match and s == match["service"]]
        if match is None or not named or not 1 <= int(match["count"]) <= 1024:
            raise StartError(f"{word!r}: give expert=N or router=N, with N from 1 to 1024")
        if named[0] in counts:
            raise StartError(f"{named[0]} is given twice")
        counts[named[0]] = int(match["count"])
    return counts


async def scale(nats_url: str, counts: dict[Service, int], seconds: float) -> ScaleReply:
    """Ask for `counts`.

    Raises:
        StartError: no NATS server answers.
        ScalingRefusedError: nobody is there who could do it, or whoever is refuses.

    """
    try:
        bus = await Bus.connect(nats_url, "scale", f"scale-{os.getpid()}", wait_seconds=CONNECT_SECONDS)
    except MoeError as error:
        raise StartError(f"NATS_URL={nats_url}: {error.message}") from None
    try:
        subject = await _whom_to_ask(bus)
        request = ScaleRequest(counts=counts, reason="openmoe scale")
        return wire.decode(ScaleReply, await bus.request(subject, wire.encode(request), timeout=seconds))
    except MoeError as error:
        raise ScalingRefusedError(error.message) from None
    finally:
        await bus.abort()


async def _whom_to_ask(bus: Bus) -> str:
    fleet = Fleet()
    await fleet.watch(bus)
    await asyncio.sleep(LISTEN_SECONDS)
    monitor = acting(fleet.live("monitor"))
    if monitor is not None:
        return subjects.control("monitor", monitor)
    try:
        answer = await bus.request(subjects.discovery("PING", "supervisor"), b"", timeout=PING_SECONDS)
        return subjects.control("supervisor", str(json.loads(answer)["id"]))
    except (MoeError, ValueError, KeyError, TypeError):
        text = "neither a monitor nor `openmoe up` answers on this NATS server; start one, or check NATS_URL"
        raise ScalingRefusedError(text) from None


def sentence(reply: ScaleReply) -> str:
    """What was done, and what there is now."""
    counts = ", ".join(f"{service}={count}" for service, count in sorted(reply.counts.items()))
    return f"{reply.text} ({counts})"
