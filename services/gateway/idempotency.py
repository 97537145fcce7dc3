"""Idempotency-Key on POST: a repeated request gets the first one's answer, also while that one still runs.

After draft-ietf-httpapi-idempotency-key-header (https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/).
The application runs in a task of the store's, which outlives the connection that asked; connections, the first and the
repeated ones alike, only read its recording. docs/decisions/0016-idempotency.md says what is kept, and why.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import time
from collections.abc import Callable

import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.claims import Claim, Claims, Entry
from services.gateway.failures import error_response
from services.gateway.recording import BrokenAnswerError, Recording, Usage
from services.gateway.redis_client import RedisClient
from services.gateway.sse import while_connected
from shared.errors import MoeError
from shared.instrumentation import IDEMPOTENT_REQUESTS
from shared.logs import request_id
from shared.settings import MIB, GatewaySettings

log = structlog.get_logger()

HEADER = b"idempotency-key"
MAX_KEY_CHARACTERS = 255
MAX_ANSWER_BYTES = 4 * MIB
"""Largest answer that is kept (a quarter of IDEMPOTENCY_CACHE_MB, if that is less)."""
MAX_ENTRIES = 10_000
MAX_BODIES = 8
"""Computations hold the bodies of so many requests of the largest size, or of as many smaller ones as that makes."""
POLL_SECONDS = 0.1
"""How often a repeat asks whether another gateway has finished."""
CLOSE_SECONDS = 1.0
"""Time for cancelled computations to give their claims back."""


def read_key(scope: Scope) -> str:
    """The request's Idempotency-Key; a quoted one (RFC 8941 String, as the draft has it) equals a bare one.

    Raises:
        MoeError: `invalid_request`.

    """
    values = [value for name, value in scope["headers"] if name == HEADER]
    if len(values) > 1:
        raise MoeError("invalid_request", "send one Idempotency-Key header, not several", param="Idempotency-Key")
    key: str = values[0].decode("latin-1").strip(" \t")
    if len(key) >= 2 and key[0] == key[-1] == '"':
        key = key[1:-1]
    if not (0 < len(key) <= MAX_KEY_CHARACTERS and key.isascii() and key.isprintable()):
        text = f"Idempotency-Key must be 1 to {MAX_KEY_CHARACTERS} printable ASCII characters; a UUID is a good one"
        raise MoeError("invalid_request", text, param="Idempotency-Key")
    return key


class Idempotency:
    """The answers to requests with a key: those that are being computed, and those kept of the finished ones."""

    def __init__(
        self,
        claims: Claims,
        *,
        ttl_seconds: float,
        max_bytes: int,
        max_running: int,
        max_body_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._claims = claims
        self._ttl_seconds = ttl_seconds
        self._max_bytes = max_bytes
        self._max_answer_bytes = min(MAX_ANSWER_BYTES, max_bytes // 4)
        self._max_running = max_running
        self._max_body_bytes = max_body_bytes
        self._body_bytes = 0
        self._clock = clock
        self._usage = Usage()
        self._running: dict[str, Recording] = {}
        self._finished: dict[str, tuple[float, Recording]] = {}  # in the order in which they expire
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._first, self._replayed, self._joined, self._mismatch = (
            IDEMPOTENT_REQUESTS.labels(result) for result in ("first", "replayed", "joined", "mismatch")
        )

    @classmethod
    def open(cls, settings: GatewaySettings, deployment: str) -> Idempotency:
        """The store of one gateway; with REDIS_URL its answers are all gateways'. Nothing is sent yet."""
        redis = RedisClient(settings.redis_url, "idempotency") if settings.redis_url else None
        return cls(
            Claims(redis, deployment, settings.idempotency_ttl_seconds),
            ttl_seconds=settings.idempotency_ttl_seconds,
            max_bytes=settings.idempotency_cache_mb * MIB,
            max_running=settings.max_concurrent_requests + settings.max_queued_requests,
            max_body_bytes=MAX_BODIES * settings.max_body_mb * MIB,
        )

    @property
    def running(self) -> int:
        """Computations under way, whether or not somebody still waits for them."""
        return len(self._tasks)

    @property
    def held_bytes(self) -> int:
        return self._usage.bytes

    @property
    def entries(self) -> int:
        return len(self._running) + len(self._finished)

    async def respond(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that has a key: from what is known, or by `app`.

        Raises:
            MoeError: a bad key, another request's key, an answer that was not kept, too many requests.
            ClientDisconnect: the client went away.

        """
        key = read_key(scope)
        body = await _read_body(receive)
        headers = dict(scope["headers"])
        name = _digest(headers.get(b"authorization", b""), key.encode()).hex()
        where = (scope["method"].encode(), scope["path"].encode(), scope["query_string"])
        fingerprint = _digest(*where, headers.get(b"content-type", b""), body)
        recording = self._find(name)
        repeated = recording is not None
        if recording is None:
            recording = self._start(app, scope, body, name, fingerprint)
        else:
            self._check(recording, fingerprint)
            (self._replayed if recording.ended else self._joined).inc()
            log.info("request.repeated", first=recording.request_id, running=not recording.ended)
        reader = recording.join(repeated=repeated)
        try:
            await while_connected(Request(scope, receive), recording.play(reader, send))
        except MoeError:  # `cancelled`, by while_connected; what the application raises is in the recording
            raise ClientDisconnect from None
        except BrokenAnswerError:
            if not recording.status:
                raise MoeError("draining", "the server is shutting down; try again in a moment") from None
            # Else the connection is closed in the middle of the answer, which is what tells the client.
        finally:
            recording.leave(reader)

    async def close(self) -> None:
        """End the computations that still run, and forget everything."""
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_SECONDS)
        for _, recording in self._finished.values():
            recording.forget()
        self._finished.clear()
        await self._claims.close()

    # -- what is known ------------------------------------------------------------------------------------------------

    def _find(self, name: str) -> Recording | None:
        now = self._clock()
        while self._finished:
            oldest = next(iter(self._finished))
            expires, recording = self._finished[oldest]
            if expires > now:
                break
            del self._finished[oldest]
            recording.forget()
        found = self._running.get(name)
        return found if found or name not in self._finished else self._finished[name][1]

    def _check(self, recording: Recording, fingerprint: bytes) -> None:
        """Refuse a repeat that cannot have the recording."""
        if recording.fingerprint != fingerprint:
            self._mismatch.inc()
            raise _mismatch()
        if recording.too_large:
            raise self._not_kept()

    def _not_kept(self) -> MoeError:
        text = (
            "this Idempotency-Key's request was answered before, but its answer was too large to be kept for repeats "
            f"(more than {self._max_answer_bytes} bytes, or IDEMPOTENCY_CACHE_MB was in use); "
            "to have it computed again, send another key"
        )
        return MoeError("idempotency_not_kept", text, param="Idempotency-Key")

    # -- computing ----------------------------------------------------------------------------------------------------

    def _start(self, app: ASGIApp, scope: Scope, body: bytes, name: str, fingerprint: bytes) -> Recording:
        if self._closed:
            raise MoeError("draining", "the server is shutting down; try again in a moment")
        if self.running >= self._max_running:
            text = f"{self.running} requests with an Idempotency-Key are running; try again in a moment"
            raise MoeError("overloaded", text)
        # The gatekeeper counts bodies while their clients are there; these stay when the clients have gone.
        if self._body_bytes + len(body) > self._max_body_bytes:
            raise MoeError("overloaded", "too many large requests are under way; try again in a moment")
        recording = self._running[name] = Recording(name, fingerprint, self._usage, request_id.get())
        task = asyncio.create_task(self._run(app, scope, body, recording), name=f"idempotent:{name[:8]}")
        self._tasks.add(task)
        self._body_bytes += len(body)
        task.add_done_callback(functools.partial(self._ended, len(body)))
        return recording

    def _ended(self, body_bytes: int, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._body_bytes -= body_bytes

    async def _run(self, app: ASGIApp, scope: Scope, body: bytes, recording: Recording) -> None:
        """Get the answer: from another gateway that has it or is at it, or else from `app`."""
        claim = Claim(recording.name, recording.fingerprint, recording.request_id)
        send = functools.partial(self._record, recording)
        try:
            found = await self._elsewhere(claim)
            if found is None:
                self._first.inc()
                async with self._claims.renewed(claim):
                    await app(scope, _Body(body), send)
            else:
                recording.elsewhere = True
                await send({"type": "http.response.start", "status": found.status, "headers": found.headers})
                await send({"type": "http.response.body", "body": found.body})
        except Exception as error:  # the connections wait for an answer; FastAPI raises what it has answered already
            if not isinstance(error, MoeError):
                if not recording.whole:
                    log.exception("request.failed")
                error = MoeError("internal_error", "internal error; see the gateway's log")
            if not recording.status:
                await error_response(error)(scope, _Body(b""), send)
        finally:
            self._finish(recording)
            if not recording.elsewhere:
                await self._tell_others(claim, recording)

    async def _tell_others(self, claim: Claim, recording: Recording) -> None:
        """Put the answer in the claim's place, or give the claim back."""
        if recording.worth_keeping and recording.complete:
            await self._claims.settle(claim, "answered", recording.status, recording.headers, recording.body())
        elif recording.worth_keeping and recording.too_large:
            await self._claims.settle(claim, "too_large")
        else:
            await self._claims.release(claim)

    async def _elsewhere(self, claim: Claim) -> Entry | None:
        """The answer of another gateway, waited for while it is being computed; None if this gateway is to compute it.

        Raises:
            MoeError: `deadline_exceeded`; another request's key; an answer that was not kept.

        """
        deadline = self._clock() + self._ttl_seconds
        waited = False
        while True:
            found = await self._claims.take(claim)
            if found is None:
                return None
            if found.fingerprint != claim.entry.fingerprint:
                self._mismatch.inc()
                raise _mismatch()
            if found.state == "too_large":
                raise self._not_kept()
            if not waited:
                waited = True
                (self._joined if found.state == "running" else self._replayed).inc()
                log.info("request.repeated", first=found.request_id, running=found.state == "running")
            if found.state == "answered":
                return found
            if self._clock() > deadline:
                raise MoeError("deadline_exceeded", "the first request with this key still runs; try again in a while")
            await asyncio.sleep(POLL_SECONDS)

    async def _record(self, recording: Recording, message: Message) -> None:
        """Take what the application sends, within the bounds."""
        if message["type"] == "http.response.start":
            recording.begin(message["status"], list(message.get("headers", [])))
        elif message["type"] == "http.response.body":
            recording.add(bytes(message.get("body", b"")), last=not message.get("more_body", False))
        if recording.complete and (recording.bytes > self._max_answer_bytes or not self._make_room()):
            log.info("idempotency.not_kept", bytes=recording.bytes, held=self.held_bytes)
            recording.too_large = True
            recording.forget()
        if recording.whole:  # before its readers have it: who repeats after a failure must not find it
            self._finish(recording)

    def _finish(self, recording: Recording) -> None:
        """Keep the answer, or the word that it was too large, or forget it."""
        if self._running.get(recording.name) is not recording:
            return
        del self._running[recording.name]
        recording.end()
        # Another gateway's answer that found no room here is found there again.
        if recording.worth_keeping and not (recording.too_large and recording.elsewhere):
            self._finished[recording.name] = self._clock() + self._ttl_seconds, recording
            self._make_room()
        else:
            recording.forget()

    def _make_room(self) -> bool:
        """Let the oldest finished answers that nobody reads go until the rest fits; whether it does."""
        if not self._fits():
            for name, (_, recording) in list(self._finished.items()):
                if self._fits():
                    break
                if not recording.readers:
                    del self._finished[name]
                    recording.forget()
        return self._usage.bytes <= self._max_bytes

    def _fits(self) -> bool:
        return self._usage.bytes <= self._max_bytes and len(self._finished) <= MAX_ENTRIES


class _Body:
    """The application's `receive`: the whole body, and then nothing, as nobody's leaving is its concern."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body

    async def __call__(self) -> Message:
        if self._body is None:
            await asyncio.get_running_loop().create_future()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


async def _read_body(receive: Receive) -> bytes:
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _digest(*parts: bytes) -> bytes:
    """A sha256 of the parts, each with its length, so that no two lists of parts are alike."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "big"))
        whole.update(part)
    return whole.digest()


def _mismatch() -> MoeError:
    text = (
        "this Idempotency-Key was sent before with another request (path, content type or body differ); "
        "repeat that one unchanged, or send a new key with this one"
    )
    return MoeError("idempotency_mismatch", text, param="Idempotency-Key")
