"""A TCP proxy between one service and NATS that cuts, holds back or delays what passes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

PIECE_BYTES = 65536
PIECES = 4096


class Proxy:
    """Listens on the loopback interface's `port`, and passes bytes on to `target` there."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.delay = 0.0
        """Seconds that each piece waits, in each direction."""
        self._open = asyncio.Event()
        self._open.set()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def connections(self) -> int:
        return len(self._tasks)

    async def listen(self) -> None:
        """Take connections, on the same port as before; nothing if it does already."""
        if self._server is not None:
            return
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", self.port)
        self.port = int(self._server.sockets[0].getsockname()[1])

    async def cut(self) -> None:
        """Close all connections, and refuse new ones until `listen`."""
        if self._server is not None:
            self._server.close()
            self._server = None
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def hold(self) -> None:
        """Keep back all bytes, of both directions; nobody is told. Connections are still taken."""
        self._open.clear()

    def release(self) -> None:
        """Let what was kept back, and all that follows, pass."""
        self._open.set()

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._connection(reader, writer), name="proxy")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Both directions, until one of them ends."""
        writers = [writer]
        tasks: list[asyncio.Task[None]] = []
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
            writers.append(back)
            for source, sink in ((reader, back), (there, writer)):
                pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(PIECES)
                tasks.append(asyncio.create_task(self._take(source, pieces), name="proxy:take"))
                tasks.append(asyncio.create_task(self._give(pieces, sink), name="proxy:give"))
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        except OSError:
            pass  # NATS is down: the connection ends, as it would without us
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for each in writers:
                each.transport.abort()

    async def _take(self, source: asyncio.StreamReader, pieces: asyncio.Queue[tuple[float, bytes]]) -> None:
        with contextlib.suppress(OSError):
            while piece := await source.read(PIECE_BYTES):
                await pieces.put((time.monotonic() + self.delay, piece))

    async def _give(self, pieces: asyncio.Queue[tuple[float, bytes]], sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while True:
                due, piece = await pieces.get()
                if (left := due - time.monotonic()) > 0:
                    await asyncio.sleep(left)
                await self._open.wait()
                sink.write(piece)
                await sink.drain()


@contextlib.asynccontextmanager
async def proxying(target: int) -> AsyncIterator[Proxy]:
    """A proxy to the loopback interface's port `target`."""
    proxy = Proxy(target)
    await proxy.listen()
    try:
        yield proxy
    finally:
        await proxy.cut()
