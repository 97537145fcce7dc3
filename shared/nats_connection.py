"""nats-py's client with the few of its habits changed that a service cannot live with.

This leans on nats-py's private parts, so it is all here, and tests/shared/test_bus.py fails when one of them moves:
what each method mends is what a test there provokes with a real server.
"""

from __future__ import annotations

import asyncio
from typing import Any

from nats.aio.client import Client


class Connection(Client):
    """One connection to NATS."""

    _pending: list[bytes]
    _pending_data_size: int

    async def _process_headers(self, headers: Any) -> dict[str, str] | None:
        """Headers that cannot be parsed are nobody's headers; nats-py would end its read loop over them."""
        try:
            parsed: dict[str, str] | None = await super()._process_headers(headers)
        except Exception as error:  # whatever a stranger's bytes provoke
            await self._error_cb(error)
            return None
        return parsed

    async def _attempt_reconnect(self) -> None:
        """Drop what was not sent: nats-py would wait for a stalled peer to take it, and then send it late."""
        self.drop_unsent()
        await super()._attempt_reconnect()

    async def _send_ping(self, future: asyncio.Future[bool] | None = None) -> None:
        """Write what is pending before the PING, so that its PONG says that all of it has arrived."""
        if self.is_connected and self._pending_data_size:
            self._transport.writelines(self._pending[:])
            self._pending, self._pending_data_size = [], 0
        await super()._send_ping(future)

    def drop_unsent(self) -> None:
        """Forget every byte that the peer has not taken, and break the connection."""
        self._pending.clear()
        self._pending_data_size = 0
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()
