"""The fleet at a glance, for the terminal."""

from __future__ import annotations

import asyncio
import os

from rich.table import Table

from shared.bus import Bus
from shared.errors import MoeError, StartError
from shared.status import STATUS_INTERVAL_SECONDS, Fleet

CONNECT_SECONDS = 3


async def fleet_table(nats_url: str) -> Table:
    """Listen for a little more than one round of reports and lay them out.

    Raises:
        StartError: no NATS server answers.

    """
    try:
        bus = await Bus.connect(nats_url, "status", f"status-{os.getpid()}", wait_seconds=CONNECT_SECONDS)
    except MoeError as error:
        raise StartError(f"NATS_URL={nats_url}: {error.message}") from None
    fleet = Fleet()
    try:
        await fleet.watch(bus)
        await asyncio.sleep(STATUS_INTERVAL_SECONDS * 1.5)
    finally:
        await bus.abort()
    table = Table("service", "instance", "state", "shards", "running", "waiting", "tokens", "memory")
    for s in fleet.live():
        shards = ",".join(str(shard) for shard in s.shards)
        memory = f"{s.memory_bytes / 2**20:.0f} MB"
        state = f"{s.state}, without state" if s.service == "monitor" and not s.state_stored else s.state
        row = (s.service, s.instance, state, shards, str(s.running), str(s.waiting), str(s.tokens_total), memory)
        table.add_row(*row)
    return table
