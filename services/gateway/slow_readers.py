"""A client that takes nothing of its answer any more is cut off; until then it holds up its own stream only."""

from __future__ import annotations

import asyncio
import struct
import sys
from typing import Any

import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from shared.instrumentation import SLOW_READERS

if sys.platform == "linux":
    import fcntl
    import termios

log = structlog.get_logger()


def unsent_bytes(transport: asyncio.Transport) -> int:
    """Bytes that the other side has not taken: those that wait before the socket, and, on Linux, in the kernel.

    The kernel takes none of the former until a third of its own buffer, which may be megabytes, is empty; without
    looking into it (SIOCOUTQ, tcp(7)) a steady but slow reader would seem to take nothing for long.
    """
    waiting = transport.get_write_buffer_size()
    if sys.platform == "linux" and not transport.is_closing():
        queued = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, struct.pack("i", 0))
        waiting += int(struct.unpack("i", queued)[0])
    return waiting


def impatient_protocol(seconds: float) -> type[HttpToolsProtocol]:
    """The protocol of uvicorn, cutting a connection whose reader takes no byte for `seconds` while it is waited for.

    While bytes pile up before the socket, uvicorn writes nothing more and the stream rests: its router goes on, and
    its tokens wait in the stream's own bounded queue. But it keeps its place in admission, so that a reader who never
    comes back would keep it for ever.
    """

    class ImpatientProtocol(HttpToolsProtocol):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self._watch: asyncio.TimerHandle | None = None

        def pause_writing(self) -> None:
            super().pause_writing()
            self._look_again()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stop_looking()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_looking()
            super().connection_lost(exc)

        def _look_again(self) -> None:
            self._stop_looking()
            self._watch = self.loop.call_later(seconds, self._look, unsent_bytes(self.transport))

        def _stop_looking(self) -> None:
            if self._watch is not None:
                self._watch.cancel()
                self._watch = None

        def _look(self, unsent_before: int) -> None:
            if unsent_bytes(self.transport) < unsent_before:
                self._look_again()
                return
            SLOW_READERS.inc()
            log.warning("reader.cut", client=self.client, unsent_bytes=unsent_before, seconds=seconds)
            self.transport.abort()  # close() would wait for the reader

    return ImpatientProtocol
