"""nats-py's client with the few of its habits changed that a service cannot live with.

This leans on nats-py's private parts, so it is all here, and tests/shared/test_bus.py fails when one of them moves:
what each method mends is what a test there provokes with a real server.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.protocol import parser

from shared.instrumentation import BAD_MESSAGES

log = structlog.get_logger()

MAX_HEADER_BYTES = 64 * 1024
"""Longer headers are nobody's: 8 MB of them would take seconds to read, in which nothing else is."""
UNSENT_BYTES = 4 * 1024 * 1024
"""Who publishes waits while so much has not been taken by the network."""
CANCEL_SECONDS = 0.1

# The server takes any byte but these four in a name; nats-py's expressions stop at every white space, and its parser
# then breaks the connection over a stranger's reply subject.
_WORD, _GAP = rb"([^ \t\r\n]+)", rb"[ \t]+"
parser.MSG_RE = re.compile(rb"\AMSG" + _GAP + _WORD + _GAP + _WORD + _GAP + rb"(" + _WORD + _GAP + rb")?(\d+)\r\n")
parser.HMSG_RE = re.compile(
    rb"\AHMSG" + _GAP + _WORD + _GAP + _WORD + _GAP + rb"(" + _WORD + _GAP + rb")?(\d+)" + _GAP + rb"(\d+)\r\n"
)


class Connection(Client):
    """One connection to NATS."""

    _pending: list[bytes]
    _pongs: list[asyncio.Future[bool]]
    _pending_data_size: int
    _reconnection_task: asyncio.Task[None] | None

    def __init__(self) -> None:
        super().__init__()
        self._callbacks: dict[int, Callable[[Msg], None]] = {}

    # -- receiving ---------------------------------------------------------------------------------------------------

    async def listen(self, subject: str, callback: Callable[[Msg], None], *, queue_group: str = "") -> Subscription:
        """Subscribe; `callback`, which must be quick and must not raise, gets each message inside the read loop.

        nats-py's own way to a callback is a queue and a task for each subscription, one more turn of the event loop.
        """
        subscription = await self.subscribe(subject, queue=queue_group)
        self._callbacks[subscription._id] = callback  # noqa: SLF001
        early = subscription._pending_queue  # noqa: SLF001 - what came while `subscribe` was still sending
        while not early.empty():
            callback(early.get_nowait())
            early.task_done()
        return subscription

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        callback = self._callbacks.get(sid)
        if callback is None:
            await super()._process_msg(sid, subject, reply, data, headers)
            return
        self.stats["in_msgs"] += 1
        self.stats["in_bytes"] += len(data)
        parsed = await self._process_headers(headers) if headers else None
        # What is raised here would end nats-py's read loop, and with it all hearing, in silence.
        try:
            to, answer = subject.decode(), reply.decode()
        except UnicodeDecodeError:
            BAD_MESSAGES.labels("name").inc()
            log.info("bus.bad_name", subject=repr(subject[:100]), reply=repr(reply[:100]))
            return
        try:
            callback(Msg(_client=self, subject=to, reply=answer, data=data, headers=parsed, _sid=sid))
        except Exception:
            log.exception("callback.failed", subject=to)

    def _remove_sub(self, sid: int, max_msgs: int = 0) -> None:
        super()._remove_sub(sid, max_msgs)
        self._callbacks.pop(sid, None)

    async def _process_headers(self, headers: Any) -> dict[str, str] | None:
        """Headers that cannot be parsed are nobody's headers; nats-py would end its read loop over them."""
        if not headers:  # nats-py's own subscriptions, those of JetStream, call this for every message
            return None
        reason = f"{len(headers)} bytes"
        if len(headers) <= MAX_HEADER_BYTES:
            try:
                parsed: dict[str, str] | None = await super()._process_headers(headers)
            except Exception as error:  # whatever a stranger's bytes provoke
                reason = str(error)
            else:
                return parsed
        BAD_MESSAGES.labels("headers").inc()
        log.info("bus.bad_headers", reason=reason)
        return None

    async def _process_pong(self) -> None:
        """Take a PONG that nobody waits for any more, too: nats-py would end its read loop over it."""
        if self._pongs and self._pongs[0].done():
            self._pongs[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()

    # -- sending -----------------------------------------------------------------------------------------------------

    @property
    def can_send(self) -> bool:
        """Whether a message may be sent now.

        Between the moment when the transport breaks and that when nats-py's read loop learns of it, nats-py still
        takes itself for connected, and uvloop's transports raise RuntimeError when they are written to.
        """
        return bool(self.is_connected) and not self._transport._io_writer.transport.is_closing()  # noqa: SLF001

    def send(self, subject: str, reply: str, payload: bytes, head: bytes) -> None:
        """Write one message to the transport now; nats-py would wake a task to do it.

        The payload goes to the socket as it is, without being copied into a longer one. The caller has checked the
        connection, the subjects and the message's size; `head` is what `header_block` made.
        """
        to = f"{subject} {reply}" if reply else subject
        if head:
            command = b"HPUB %s %d %d\r\n%s" % (to.encode(), len(head), len(head) + len(payload), head)
        else:
            command = b"PUB %s %d\r\n" % (to.encode(), len(payload))
        self.stats["out_msgs"] += 1
        self.stats["out_bytes"] += len(payload)
        self._write((command, payload, b"\r\n"))

    async def taken(self) -> None:
        """Wait while too much is still to be sent."""
        if self._transport._io_writer.transport.get_write_buffer_size() > UNSENT_BYTES:  # noqa: SLF001
            await self._transport.drain()

    async def _send_publish(
        self,
        subject: str,
        reply: str,
        payload: bytes,
        payload_size: int,  # noqa: ARG002 - the overridden method's
        headers: dict[str, Any] | None,
    ) -> None:
        self.send(subject, reply, payload, header_block(headers))
        await self.taken()

    def _write(self, pieces: tuple[bytes, ...] = ()) -> None:
        """Write what is pending, then `pieces`."""
        if self._pending:
            pieces = (*self._pending, *pieces)
            self._pending = []
        self._pending_data_size = 0
        if pieces:
            self._transport.writelines(pieces)

    async def _send_ping(self, future: asyncio.Future[bool] | None = None) -> None:
        """Write what is pending before the PING, so that its PONG says that all of it has arrived."""
        if self.is_connected:
            self._write()
        await super()._send_ping(future)

    # -- breaking ----------------------------------------------------------------------------------------------------

    async def _attempt_reconnect(self) -> None:
        """Drop what was not sent: nats-py would wait for a stalled peer to take it, and then send it late."""
        self.drop_unsent()
        await super()._attempt_reconnect()

    async def close(self) -> None:
        """Close, and end the task that reconnects, which may have missed that it was cancelled.

        Before Python 3.12 a cancellation that comes just when a connect fails is lost in asyncio.wait_for.
        """
        await super().close()
        task = self._reconnection_task
        while task is not None and not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=CANCEL_SECONDS)

    def drop_unsent(self) -> None:
        """Forget every byte that the peer has not taken, and break the connection."""
        self._pending.clear()
        self._pending_data_size = 0
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()


def header_block(headers: dict[str, str] | None) -> bytes:
    """Headers as the server takes them; a line break in a value, which would begin another header, becomes a space."""
    if not headers:
        return b""
    # strip() also makes a string of nats-py's own names, an enumeration whose members are formatted as something else.
    lines = (f"{name.strip()}: {value.strip()}" for name, value in headers.items())
    text = "\n".join(line.replace("\r", " ").replace("\n", " ") for line in lines).replace("\n", "\r\n")
    return f"NATS/1.0\r\n{text}\r\n\r\n".encode()
