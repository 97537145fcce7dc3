"""A webhook's receiver: a real HTTP server that answers as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

SECRET = "correct-horse-battery"


@dataclass
class Receiver:
    """An HTTP server that answers as it is told, and what it got."""

    port: int
    answers: list[int | float] = field(default_factory=list)
    """The next answers: a status, or seconds (a float) of silence before the connection closes; then 200."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook/{SECRET}"

    async def on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    await self._answer(reader, writer)
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(int(ln.split(":")[1]) for ln in head.splitlines() if ln.lower().startswith("content-length:"))
        self.heads.append(head)
        self.bodies.append(json.loads(await reader.readexactly(length)))
        answer = self.answers.pop(0) if self.answers else 200
        if isinstance(answer, float):
            await asyncio.sleep(answer)
            raise ConnectionResetError
        writer.write(b"HTTP/1.1 %d Said\r\nContent-Length: 2\r\n\r\nok" % answer)
        await writer.drain()

    def statuses(self) -> list[str]:
        return [body["status"] for body in self.bodies]


@contextlib.asynccontextmanager
async def receiving(receiver: Receiver) -> AsyncIterator[Receiver]:
    connections: set[asyncio.Task[None]] = set()

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        with contextlib.suppress(asyncio.CancelledError):
            await receiver.on_connection(reader, writer)

    server = await asyncio.start_server(on_connection, "127.0.0.1", receiver.port)
    try:
        yield receiver
    finally:
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        await server.wait_closed()
