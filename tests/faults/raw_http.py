"""HTTP over sockets of our own: clients that arrive when they want to, and clients that stop reading."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

RECEIVE_BYTES = 4096


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        """The error's."""
        return str(json.loads(self.body)["error"]["code"])


def _request(url: str, path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nConnection: close\r\nContent-Length: {len(data)}\r\n"
    )
    return head.encode() + b"\r\n" + data


def _parse(raw: bytes) -> Answer:
    head, _, body = raw.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        body = _join(body)
    return Answer(int(status.split()[1]), headers, body)


def _join(chunked: bytes) -> bytes:
    body = b""
    while chunked:
        size, _, chunked = chunked.partition(b"\r\n")
        length = int(size, 16)
        if not length:
            break
        body, chunked = body + chunked[:length], chunked[length + 2 :]
    return body


async def ask(url: str, path: str, body: dict[str, Any]) -> Answer:
    """One request over a connection of its own."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        writer.write(_request(url, path, body))
        return _parse(await reader.read())
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


class LazyReader:
    """A client that reads only when it is told to; the kernel reads little ahead for it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.read_so_far = bytearray()

    async def read(self, count: int) -> bool:
        """Read up to `count` bytes; False at the end of the answer."""
        piece = await asyncio.get_running_loop().sock_recv(self._connection, count)
        self.read_so_far += piece
        return bool(piece)

    async def rest(self) -> Answer:
        """The whole answer, once it has come."""
        while await self.read(1 << 16):
            pass
        return _parse(bytes(self.read_so_far))


@contextlib.asynccontextmanager
async def lazy_reader(url: str, path: str, body: dict[str, Any]) -> AsyncIterator[LazyReader]:
    """Send a request, and read nothing yet."""
    parts = urlsplit(url)
    with socket.socket() as connection:
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(connection, (parts.hostname, parts.port))
        await loop.sock_sendall(connection, _request(url, path, body))
        yield LazyReader(connection)


async def metric(client: httpx.AsyncClient, name: str) -> float:
    """A metric's value, over all its labels."""
    lines = (await client.get("/metrics")).text.splitlines()
    found = [line.rsplit(" ", 1) for line in lines if line.startswith((f"{name} ", f"{name}{{"))]
    assert found, f"there is no metric {name}"
    return sum(float(value) for _, value in found)
