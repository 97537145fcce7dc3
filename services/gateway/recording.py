"""An HTTP answer as the application gives it, for any number of readers: each at its own pace, from the start."""

from __future__ import annotations

import asyncio
import itertools

from starlette.types import Message, Send

from services.gateway.sse import is_error_event

Headers = list[tuple[bytes, bytes]]

CHUNK_OVERHEAD_BYTES = 64
"""What one body message takes beside its bytes."""
MAX_LAG_BYTES = 1024 * 1024
"""How far a reader may be behind in an answer that is not kept; beyond that it is cut off."""
SEND_BYTES = 64 * 1024
"""Chunks that wait for a reader are sent together, up to about so much."""
REPLAYED = (b"idempotency-replayed", b"true")


class BrokenAnswerError(Exception):
    """The answer ended in its middle, or this reader is too far behind: all that is left is to close the connection."""


class Usage:
    """Bytes held by all recordings of one store."""

    def __init__(self) -> None:
        self.bytes = 0


class Reader:
    """One connection's place in a recording, and whether it is told that the answer is another request's."""

    __slots__ = ("chunks", "repeated")

    def __init__(self, repeated: bool) -> None:
        self.chunks = 0
        """Chunks taken so far."""
        self.repeated = repeated


class Recording:
    """One answer: its start, its body's chunks, and whether it has ended.

    While `complete` nothing of it is dropped. After `forget` only what some reader has yet to read is held, and no more
    than MAX_LAG_BYTES of that (always the newest chunk, so an answer in one piece reaches whoever waits for it).
    """

    def __init__(self, name: str, fingerprint: bytes, usage: Usage, request_id: str = "") -> None:
        self.name = name
        self.fingerprint = fingerprint
        self.request_id = request_id
        """The id of the request that is answered."""
        self.status = 0
        self.headers: Headers = []
        self.ended = False
        self.whole = False
        """Whether the application gave it to its end."""
        self.elsewhere = False
        """Whether another gateway computed it."""
        self.complete = True
        """Whether it is held from its first byte on."""
        self.too_large = False
        """Whether it is not, because it outgrew its bound."""
        self.bytes = 0
        self.total = 0
        """Chunks so far, dropped ones included."""
        self.readers: set[Reader] = set()
        self._usage = usage
        self._chunks: list[bytes] = []
        self._news = asyncio.Event()
        self._events = False
        self._failed = False

    # -- the application's side ---------------------------------------------------------------------------------------

    def begin(self, status: int, headers: Headers) -> None:
        """Take the answer's status and headers."""
        self.status = status
        self.headers = headers
        self._events = any(k.lower() == b"content-type" and v.startswith(b"text/event-stream") for k, v in headers)
        self._hold(sum(len(k) + len(v) for k, v in headers))
        self._tell()

    def add(self, chunk: bytes, *, last: bool) -> None:
        """Take a piece of its body."""
        if chunk:
            self._failed = self._failed or (self._events and is_error_event(chunk))
            self._chunks.append(chunk)
            self.total += 1
            self._hold(len(chunk) + CHUNK_OVERHEAD_BYTES)
            if not self.complete:
                self._trim()
        self.whole = self.whole or last
        self._tell()

    def end(self) -> None:
        """Nothing more will come."""
        self.ended = True
        if not self.complete:
            self._trim()
        self._tell()

    @property
    def worth_keeping(self) -> bool:
        """Whether a later repeat is to get this answer: it succeeded to its end.

        Refusals (4xx) computed nothing, so the key stays free for a corrected body; failures may succeed next time.
        """
        return self.whole and not self._failed and 200 <= self.status < 400

    def body(self) -> bytes:
        """The body, of a complete recording."""
        return b"".join(self._chunks)

    def forget(self) -> None:
        """Hold no more than readers have yet to read."""
        self.complete = False
        self._trim()

    # -- the readers' side --------------------------------------------------------------------------------------------

    def join(self, *, repeated: bool) -> Reader:
        """Add a reader, from the first byte."""
        reader = Reader(repeated)
        self.readers.add(reader)
        return reader

    def leave(self, reader: Reader) -> None:
        self.readers.discard(reader)
        if not self.complete:
            self._trim()

    async def play(self, reader: Reader, send: Send) -> None:
        """Send the answer from its start to its end, as fast as `send` takes it and as it comes.

        Raises:
            BrokenAnswerError: it has no end, or the reader is too far behind.

        """
        begun = finished = False
        while not finished:
            news = self._news
            if self.status and not begun:
                begun = True
                replayed = [REPLAYED] if reader.repeated or self.elsewhere else []
                await send(
                    {"type": "http.response.start", "status": self.status, "headers": [*self.headers, *replayed]}
                )
            while begun and reader.chunks < self.total:
                data = self._take(reader)
                finished = self.whole and reader.chunks == self.total
                await send(_body(data, more=not finished))
            if self.whole and not finished and begun:
                finished = True
                await send(_body(b"", more=False))
            elif self.ended and not finished:
                raise BrokenAnswerError
            elif not finished:
                await news.wait()

    def _hold(self, count: int) -> None:
        self.bytes += count
        self._usage.bytes += count

    def _take(self, reader: Reader) -> bytes:
        """What the reader has not had yet, up to about SEND_BYTES."""
        start = len(self._chunks) - (self.total - reader.chunks)
        if start < 0:
            raise BrokenAnswerError
        taken, size = [self._chunks[start]], len(self._chunks[start])
        for chunk in itertools.islice(self._chunks, start + 1, None):
            size += len(chunk)
            if size > SEND_BYTES:
                break
            taken.append(chunk)
        reader.chunks += len(taken)
        return b"".join(taken)

    def _trim(self) -> None:
        """Drop what every reader has had, and what would be too much to hold for the slow ones."""
        if self.ended and not self.readers:
            self._chunks.clear()
            self._hold(-self.bytes)
            return
        had = min((reader.chunks for reader in self.readers), default=self.total)
        drop = max(0, had - (self.total - len(self._chunks)))
        freed = sum(len(chunk) + CHUNK_OVERHEAD_BYTES for chunk in self._chunks[:drop])
        while self.bytes - freed > MAX_LAG_BYTES and drop < len(self._chunks) - 1:
            freed += len(self._chunks[drop]) + CHUNK_OVERHEAD_BYTES
            drop += 1
        del self._chunks[:drop]
        self._hold(-freed)

    def _tell(self) -> None:
        """Wake the readers that wait."""
        news, self._news = self._news, asyncio.Event()
        news.set()


def _body(chunk: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": chunk, "more_body": more}
