"""HTTP/1.1 as a load generator needs it: a C parser per connection, and one callback per piece of a body.

httpx, which the other commands use, took 1.6 ms of a core for each forward request over 64 connections and 39 us for
each streamed token; this, with all that `services/benchmark_requests.py` does, takes 0.08 ms and 8 us (against a server
that does nothing else, on the 2-core Xeon of docs/performance.md). On a small machine the generator would otherwise
take the time that it means to measure. httptools is what uvicorn parses with, so it is here already.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import msgspec

from shared.errors import StartError

MAX_IDLE_SECONDS = 1.0
"""A connection that rested longer is not used again: its server may be closing it."""
MAX_REFUSAL_BYTES = 65536
OnBody = Callable[[bytes], None]


class TransferError(Exception):
    """The answer did not come, or not whole; its text says why."""


class Refusal(msgspec.Struct):
    """OpenAI's error object, as much of it as is shown."""

    message: str = ""
    code: str | int | None = None


class RefusalBody(msgspec.Struct):
    error: Refusal


def refusal(body: bytes) -> Refusal:
    """What an error's body says; of bodies of another form, their beginning."""
    try:
        return msgspec.json.decode(body, type=RefusalBody).error
    except msgspec.MsgspecError:
        return Refusal(body[:200].decode(errors="replace").strip())


class Connection(asyncio.Protocol):
    """One connection: one request at a time."""

    def __init__(self) -> None:
        self.closed = False
        self.idle_since = 0.0
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._answered: asyncio.Future[None] | None = None
        self._on_body: OnBody = _ignore
        self._take: OnBody = _ignore
        self._refusal = bytearray()
        self._sized = False
        self._ends_with_connection = False
        self._stays = False

    async def ask(self, request: bytes, on_body: OnBody) -> tuple[int, bytes]:
        """Send one request; (status, the body if the status is not 200), once the answer is whole.

        Args:
            request: head and body.
            on_body: gets each piece of a body with status 200 as it comes; it must not raise.

        Raises:
            TransferError: the connection broke, or what came is not HTTP.

        """
        assert self._transport is not None  # noqa: S101 - made with the connection
        self._parser = httptools.HttpResponseParser(self)
        self._on_body, self._refusal, self._sized, self._ends_with_connection = on_body, bytearray(), False, False
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            await self._answered
        except BaseException:
            self.abort()
            raise
        if not self._stays:
            self.abort()
        self.idle_since = time.perf_counter()
        return self._parser.get_status_code(), bytes(self._refusal)

    def abort(self) -> None:
        self.closed = True
        if self._transport is not None:
            self._transport.abort()

    def _refuse(self, piece: bytes) -> None:
        if len(self._refusal) < MAX_REFUSAL_BYTES:
            self._refusal += piece

    # asyncio's side
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are not of asyncio's class

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(f"what came is not HTTP: {error}")
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if exc is None and self._ends_with_connection:
            self.on_message_complete()
        self._fail(f"the connection broke: {exc}" if exc else "the server closed the connection before it had answered")

    def _fail(self, text: str) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(TransferError(text))

    # httptools' side
    def on_header(self, name: bytes, _value: bytes) -> None:
        self._sized = self._sized or name.lower() in {b"content-length", b"transfer-encoding"}

    def on_headers_complete(self) -> None:
        self._ends_with_connection = not self._sized  # RFC 9112, 6.3: then the body ends where the connection does
        self._take = self._on_body if self._parser.get_status_code() == 200 else self._refuse

    def on_body(self, body: bytes) -> None:
        self._take(body)

    def on_message_complete(self) -> None:
        # Asked here, as the parser forgets it with the message.
        self._stays = not self._ends_with_connection and self._parser.should_keep_alive()
        if self._answered is not None and not self._answered.done():
            self._answered.set_result(None)


def _ignore(_piece: bytes) -> None:
    return


class Client:
    """A server's connections, used again while they are warm; as many as there are requests in flight."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """Take the server's base URL, as http://host:port or https://host/prefix.

        Raises:
            StartError: the URL or the key cannot be used.

        """
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise StartError(f"{url}: {error}") from None
        if parts.scheme not in {"http", "https"} or not host:
            raise StartError(f"{url}: not the address of a server; it looks like http://127.0.0.1:8000")
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise StartError("the API key has characters that an HTTP header cannot carry")
        tls = parts.scheme == "https"
        self.url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
        self._host, self._port = host, port or (443 if tls else 80)
        self._tls = ssl.create_default_context() if tls else None
        self._prefix = parts.path.rstrip("/")
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._head = f"Host: {parts.netloc.rpartition('@')[2]}\r\nUser-Agent: openmoe-bench\r\n{key}"
        self._free: list[Connection] = []

    async def _connection(self) -> Connection:
        while self._free:
            connection = self._free.pop()
            if not connection.closed and time.perf_counter() - connection.idle_since < MAX_IDLE_SECONDS:
                return connection
            connection.abort()
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(Connection, self._host, self._port, ssl=self._tls)
        except (OSError, ssl.SSLError) as error:
            raise TransferError(f"cannot connect: {error.strerror or error}") from None
        return connection

    async def ask(
        self, method: str, path: str, body: bytes, on_body: OnBody, content_type: str = "application/json"
    ) -> tuple[int, bytes]:
        """One exchange; (status, the body if the status is not 200). Deadlines are the caller's.

        Raises:
            TransferError: no connection, or one that broke.

        """
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._head}"
        if body:
            head += f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
        connection = await self._connection()
        answer = await connection.ask(head.encode("latin-1") + b"\r\n" + body, on_body)
        if not connection.closed:
            self._free.append(connection)
        return answer

    async def json(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """(status, the answer): decoded JSON with status 200, otherwise a `Refusal`.

        Raises:
            TransferError: no answer, or one that is not JSON.

        """
        pieces: list[bytes] = []
        sent = b"" if body is None else msgspec.json.encode(body)
        status, refused = await self.ask(method, path, sent, pieces.append)
        if status != 200:
            return status, refusal(refused)
        try:
            return status, msgspec.json.decode(b"".join(pieces))
        except msgspec.MsgspecError as error:
            raise TransferError(f"{path}: the answer is not JSON: {error}") from None

    def close(self) -> None:
        for connection in self._free:
            connection.abort()
        self._free.clear()
