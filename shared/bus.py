"""The connection to NATS: requests with deadlines, streamed replies, and bounded serving.

Nothing else touches nats-py but shared/jetstream.py, which keeps things over the same connection.

What nats-py does not do by itself and this module does (all measured, see docs/decisions/): fail requests at once when
the connection breaks, never buffer stale requests while reconnecting, keep callbacks short, bound every queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import math
import random
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Self

import nats.errors
import structlog
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js import JetStreamContext

from shared import subjects
from shared.errors import HTTP_STATUS, MoeError
from shared.instrumentation import BAD_MESSAGES, BUS_DROPPED
from shared.nats_connection import Connection, header_block

log = structlog.get_logger()

REQUEST_ID = "Moe-Request-Id"
BUDGET_MS = "Moe-Budget-Ms"
ERROR_TEXT = "Nats-Service-Error"
ERROR_CODE = "Nats-Service-Error-Code"
MAX_BUDGET_CHARACTERS = 32
MAX_ERROR_CHARACTERS = 1000
HEADER_ALLOWANCE = 4096  # the server counts headers into max_payload, nats-py's own check does not
STREAM_QUEUE_CHUNKS = 65536
CONNECT_SECONDS = 2
BEAT_SECONDS = 0.1
STALL_SECONDS = 1.0
"""An event loop that did not beat for so long was stopped, and what it reads next may have come any time since."""

deadline: ContextVar[float | None] = ContextVar("deadline", default=None)
"""While a handler runs: when, on the monotonic clock, its caller stops waiting. Counted from the message's arrival."""

Headers = dict[str, str]
Take = Callable[[Msg | MoeError], None]
"""What is done, at once, with a reply, or with the loss of the connection that it should have come by."""


class NoRespondersError(MoeError):
    """Nobody listens on the subject; the server says so at once."""

    def __init__(self, subject: str) -> None:
        super().__init__("router_unavailable", f"no service listens on {subject}")
        self.subject = subject


def as_it_is(_request: int, data: bytes) -> bytes:
    """A reply that needs no reading."""
    return data


def raise_for_error(message: Msg) -> None:
    """Raise what `message` says went wrong, if it is an error reply."""
    headers = message.headers
    if not headers:
        return
    if headers.get("Status") == "503":
        raise NoRespondersError(message.subject)
    code = headers.get(ERROR_CODE)
    if code:
        if code not in HTTP_STATUS:
            code = "internal_error"
        raise MoeError(code, headers.get(ERROR_TEXT, "")[:MAX_ERROR_CHARACTERS] or "the service gave no reason")


def outcome(subject: str, item: Msg | MoeError) -> bytes | MoeError:
    """A request's result: the reply's data, or how it failed."""
    if isinstance(item, MoeError):
        return item
    if item.headers:
        try:
            raise_for_error(item)
        except NoRespondersError:
            return NoRespondersError(subject)
        except MoeError as error:
            return error
    return bytes(item.data)


def budget_deadline(headers: Headers | None, now: float) -> float | None:
    """When (on the monotonic clock) work with these headers expires; None if it never does."""
    value = (headers or {}).get(BUDGET_MS)
    try:
        milliseconds = float(value) if value and len(value) <= MAX_BUDGET_CHARACTERS else math.inf
    except ValueError:
        return None
    return now + milliseconds / 1000 if math.isfinite(milliseconds) else None


def raise_if_expired(expires: float | None) -> None:
    """Refuse work that nobody waits for any more.

    Raises:
        MoeError: `deadline_exceeded`.

    """
    if expires is not None and time.monotonic() > expires:
        raise MoeError("deadline_exceeded", "the caller no longer waits")


def without_secrets(url: str) -> str:
    """`url` without the user and password that it may carry."""
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


@dataclass
class Served:
    """One subscription's work: the callback only enqueues; `workers` tasks take from the bounded queue."""

    subject: str
    handler: Callable[[Msg], Awaitable[None]]
    queue: asyncio.Queue[tuple[Msg, float | None]]
    queue_group: str = ""
    subscription: Subscription | None = None
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    requests: int = 0
    errors: int = 0
    last_error: str = ""
    processing_seconds: float = 0.0
    refused: int = 0

    async def stop_taking(self) -> None:
        """Take no new work, finish what is queued and in flight."""
        if self.subscription is not None:
            subscription, self.subscription = self.subscription, None
            await subscription.drain()
        await self.queue.join()


class Bus:
    """One NATS connection of one service instance."""

    def __init__(self, client: Connection, service: str, instance: str) -> None:
        self.service = service
        self.instance = instance
        self._client = client
        self._prefix = subjects.inbox_prefix(service, instance)
        self._tokens = itertools.count(1)
        self._waiting: dict[str, Take] = {}
        self.served: list[Served] = []
        self._watching: list[Subscription] = []
        self._closing = False
        self._beat = time.monotonic()
        self._stalled_at: float | None = None
        self._beating = asyncio.get_running_loop().call_later(BEAT_SECONDS, self._on_beat)
        self._catching_up: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, url: str, service: str, instance: str, *, wait_seconds: float = 60) -> Self:
        """Connect, waiting with backoff up to `wait_seconds` for a server that is not there yet.

        Raises:
            MoeError: `bus_unavailable`, if no server answered in that time.

        """
        bus: Self | None = None

        async def on_error(error: Exception) -> None:
            if isinstance(error, nats.errors.SlowConsumerError):
                BUS_DROPPED.inc()
            log.warning("bus.error", error=str(error) or type(error).__name__)

        async def on_disconnect() -> None:
            if bus is None or not bus._closing:
                log.warning("bus.disconnected")
            if bus is not None:
                bus._fail_waiting()

        async def on_reconnect() -> None:
            log.info("bus.reconnected")

        give_up = time.monotonic() + wait_seconds
        delay = 0.1
        while True:
            try:
                client = Connection()
                await client.connect(
                    url,
                    name=f"{service}.{instance}",
                    inbox_prefix=subjects.inbox_prefix(service, instance),  # of what nats-py asks by itself
                    error_cb=on_error,
                    disconnected_cb=on_disconnect,
                    reconnected_cb=on_reconnect,
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0.2 + random.random() * 0.3,  # noqa: S311 - jitter, not a secret
                    connect_timeout=CONNECT_SECONDS,
                    ping_interval=3,
                    max_outstanding_pings=2,
                    pending_size=0,  # nothing is buffered while reconnecting: it would be sent late
                    allow_reconnect=False,
                )
                # Only once there was a server: the first attempt must end, so that this loop can say how it goes.
                client.options.update(allow_reconnect=True, max_reconnect_attempts=-1)
                break
            except Exception as error:  # nats-py raises a dozen types here; all mean "not yet"
                if time.monotonic() + delay > give_up:
                    raise MoeError(
                        "bus_unavailable", f"no NATS server answered: {str(error) or type(error).__name__}"
                    ) from None
                log.info("bus.waiting", url=without_secrets(url), retry_in_seconds=round(delay, 2))
                await asyncio.sleep(delay)
                delay = min(delay * 2, 2.0)
        bus = cls(client, service, instance)
        bus._watching.append(await client.listen(f"{bus._prefix}.*", bus._on_reply))
        return bus

    @property
    def max_payload(self) -> int:
        """Bytes of one message that are safe to send, from the server's own limit."""
        return int(self._client.max_payload) - HEADER_ALLOWANCE

    @property
    def connected(self) -> bool:
        return bool(self._client.is_connected)

    @property
    def connection(self) -> int | None:
        """The number of this connection to NATS, another one after each reconnect; None while there is none."""
        return int(self._client.stats["reconnects"]) if self.connected else None

    def jetstream(self, seconds: float) -> JetStreamContext:
        """nats-py's JetStream client on this connection, each of its calls bounded; for shared/jetstream.py."""
        return self._client.jetstream(timeout=seconds)

    @property
    def waiting(self) -> int:
        """Requests and streams whose reply is outstanding."""
        return len(self._waiting)

    # -- asking ------------------------------------------------------------------------------------------------------

    async def publish(self, subject: str, data: bytes, *, reply: str = "", headers: Headers | None = None) -> None:
        """Send one message.

        Raises:
            MoeError: `bus_unavailable` while disconnected, `payload_too_large` over the server's limit.

        """
        self._check(data)
        try:
            await self._client.publish(subject, data, reply=reply, headers=headers)
        except (nats.errors.Error, OSError) as error:
            raise MoeError("bus_unavailable", f"NATS refused the message: {error}") from error

    def _check(self, data: bytes) -> None:
        if not self._client.can_send:
            raise MoeError("bus_unavailable", "the connection to NATS is down; try again in a moment")
        if len(data) > self.max_payload:
            raise MoeError("payload_too_large", f"the message has {len(data)} bytes, the bus takes {self.max_payload}")

    async def request(self, subject: str, data: bytes, *, timeout: float, headers: Headers | None = None) -> bytes:
        """Send one message and await its one reply.

        Raises:
            MoeError: the reply's own error, `deadline_exceeded`, or `bus_unavailable` as soon as the connection breaks.
            NoRespondersError: when nobody listens.

        """
        until = time.monotonic() + timeout
        with self.exchange(1, headers) as exchange:
            exchange.send(0, subject, data)
            if await exchange.wait(until):
                return bytes(exchange.answers[0])
            for _, error in exchange.take_errors():
                raise error
            raise MoeError("deadline_exceeded", f"no answer on {subject} within {timeout:.3g} s")

    def exchange(
        self, count: int, headers: Headers | None = None, read: Callable[[int, bytes], Any] = as_it_is
    ) -> Exchange:
        """`count` requests that are waited for together, each of which may be sent more than once.

        Args:
            count: how many.
            headers: of every message.
            read: makes of a request's number and its reply's data what `answers` holds; what it refuses with a
                MoeError has failed, as if the service had said so. Runs in the read loop: it must be quick.

        """
        return Exchange(self, count, headers, read)

    def open_stream(self) -> ReplyStream:
        """An inbox for the many replies of one request; use it as a context manager."""
        return ReplyStream(self)

    def _expect(self, take: Take) -> tuple[str, str]:
        """Have `take` called with each reply to the returned inbox, or with the connection's loss: (token, inbox)."""
        token = str(next(self._tokens))
        self._waiting[token] = take
        return token, f"{self._prefix}.{token}"

    def _forget(self, token: str) -> None:
        self._waiting.pop(token, None)

    def _on_reply(self, message: Msg) -> None:
        take = self._waiting.get(message.subject[len(self._prefix) + 1 :])
        if take is not None:
            take(message)

    def _fail_waiting(self) -> None:
        for take in list(self._waiting.values()):
            take(MoeError("bus_unavailable", "the connection to NATS broke while waiting for an answer"))

    # -- answering ---------------------------------------------------------------------------------------------------

    def arrival(self) -> float:
        """When, on the monotonic clock, the message in hand arrived.

        After a stall (SIGSTOP, a loop that was blocked) what waited in the socket counts as arrived when the stall
        began, the earliest that it can have: work that nobody waits for any more is so dropped, and not computed.
        """
        now = time.monotonic()
        self._notice_stall(now)
        return now if self._stalled_at is None else self._stalled_at

    def _on_beat(self) -> None:
        now = time.monotonic()
        self._notice_stall(now)
        self._beat = now
        self._beating = asyncio.get_running_loop().call_later(BEAT_SECONDS, self._on_beat)

    def _notice_stall(self, now: float) -> None:
        if now - self._beat <= STALL_SECONDS or self._stalled_at is not None:
            return
        log.warning("bus.stalled", seconds=round(now - self._beat, 2))
        self._stalled_at = self._beat
        self._catching_up = asyncio.get_running_loop().create_task(self._catch_up(), name="catch-up")

    async def _catch_up(self) -> None:
        """Until the server's PONG: it comes after all that the server had sent by the time it was asked."""
        try:
            await self.flush()
        except MoeError as error:  # what was not read by now is lost with the connection
            log.debug("bus.flush_failed", error=error.message)
        finally:
            self._stalled_at = None

    async def serve(
        self,
        subject: str,
        handler: Callable[[Msg], Awaitable[None]],
        *,
        queue_group: str = "",
        capacity: int = 64,
        workers: int = 1,
    ) -> Served:
        """Answer `subject` with `handler` in `workers` tasks; a full queue answers `overloaded` at once.

        What the handler raises becomes one typed error reply; an unknown error's text goes to the log only.
        """
        served = Served(subject, handler, asyncio.Queue(capacity), queue_group)
        bad_messages = BAD_MESSAGES.labels(subjects.kind(subject))

        def on_message(message: Msg) -> None:
            try:
                served.queue.put_nowait((message, budget_deadline(message.headers, self.arrival())))
            except asyncio.QueueFull:
                served.refused += 1
                self.reply_error(message, MoeError("overloaded", f"{self.service} {self.instance} is full"))

        async def work() -> None:
            while True:
                message, expires = await served.queue.get()
                start = time.perf_counter()
                served.requests += 1
                deadline.set(expires)
                try:
                    raise_if_expired(expires)
                    await handler(message)
                except MoeError as error:
                    served.errors += 1
                    served.last_error = error.code
                    if error.code == "bad_message":
                        bad_messages.inc()
                    self.reply_error(message, error)
                except asyncio.CancelledError:
                    raise
                except Exception:  # a bug of ours: the client gets a neutral sentence, the log the traceback
                    served.errors += 1
                    served.last_error = "internal_error"
                    log.exception("handler.failed", subject=subject)
                    self.reply_error(message, MoeError("internal_error", "internal error; see the service's log"))
                finally:
                    served.processing_seconds += time.perf_counter() - start
                    served.queue.task_done()

        for n in range(workers):
            served.tasks.append(asyncio.create_task(work(), name=f"serve:{subject}:{n}"))
        served.subscription = await self._client.listen(subject, on_message, queue_group=queue_group)
        self.served.append(served)
        return served

    async def watch(self, subject: str, callback: Callable[[Msg], None]) -> None:
        """Call `callback`, which must be quick and not raise, for each message on `subject`."""

        def on_message(message: Msg) -> None:
            try:
                callback(message)
            except Exception:  # somebody's malformed message must not stop the watching
                log.warning("watch.failed", subject=message.subject, exc_info=True)

        self._watching.append(await self._client.listen(subject, on_message))

    async def reply(self, message: Msg, data: bytes, headers: Headers | None = None) -> None:
        if message.reply:
            await self.publish(message.reply, data, headers=headers)

    def reply_error(self, message: Msg, error: MoeError) -> None:
        """Answer with an error; waits for nothing, as the read loop refuses requests by it too."""
        if not message.reply:
            return
        if self._client.can_send:
            self._client.send(message.reply, "", b"", header_block(error_headers(error)))
        else:
            log.warning("reply.lost", code=error.code)

    async def flush(self, timeout: float = CONNECT_SECONDS) -> None:
        """Return when everything sent so far has reached the server.

        Raises:
            MoeError: `bus_unavailable`, if that takes more than `timeout` seconds.

        """
        if self.connected:
            try:
                await self._client.flush(timeout=timeout)
            except (nats.errors.Error, OSError) as error:
                raise MoeError("bus_unavailable", f"NATS does not answer: {error}") from error

    async def abort(self) -> None:
        """Close without waiting for work in flight."""
        self._closing = True
        self._beating.cancel()
        if self._catching_up is not None:
            self._catching_up.cancel()
            await asyncio.gather(self._catching_up, return_exceptions=True)
        for served in self.served:
            for task in served.tasks:
                task.cancel()
            await asyncio.gather(*served.tasks, return_exceptions=True)
        self._fail_waiting()
        if not self._client.is_closed:
            try:
                await self.flush()
            except MoeError as error:  # the connection is going anyway
                log.debug("bus.flush_failed", error=error.message)
                self._client.drop_unsent()
            with contextlib.suppress(OSError):
                await self._client.close()


class Exchange:
    """Requests under way together, each of which may be sent more than once: to the first answer. Close it.

    One future and one timer for all of them. The subjects are the caller's own, from shared/subjects.py, and go to the
    server unchecked.
    """

    def __init__(self, bus: Bus, count: int, headers: Headers | None, read: Callable[[int, bytes], Any]) -> None:
        self._bus = bus
        self._count = count
        self._read = read
        self._head = header_block(headers)
        self._tokens: list[str] = []
        self._errors: list[tuple[int, MoeError]] = []
        self._woken: asyncio.Future[None] | None = None
        self.answers: dict[int, Any] = {}
        """By request: its first answer, as it was read."""
        self.answered_by: dict[int, int] = {}
        """By request: the number of the sending that was answered."""
        self.arrived: dict[int, float] = {}
        """By request: when its answer came, on the monotonic clock."""

    @property
    def complete(self) -> bool:
        """Whether every request is answered."""
        return len(self.answers) == self._count

    def send(self, request: int, subject: str, data: bytes) -> int:
        """Send a request's message, once more perhaps; returns the number of this sending, from 0 on.

        What goes wrong at once, as everything that goes wrong, is found among the errors.
        """
        sending = len(self._tokens)
        token, reply = self._bus._expect(functools.partial(self._take, request, sending, subject))  # noqa: SLF001 - one module, one mechanism
        self._tokens.append(token)
        try:
            self._bus._check(data)  # noqa: SLF001
            self._bus._client.send(subject, reply, data, self._head)  # noqa: SLF001
        except MoeError as error:
            self._fail(sending, error)
        return sending

    def _take(self, request: int, sending: int, subject: str, item: Msg | MoeError) -> None:
        data = outcome(subject, item)
        self._bus._forget(self._tokens[sending])  # noqa: SLF001 - a sending has one outcome
        if isinstance(data, MoeError):
            self._fail(sending, data)
        elif request not in self.answers:
            try:
                self.answers[request] = self._read(request, data)
            except MoeError as error:
                self._fail(sending, error)
                return
            self.answered_by[request] = sending
            self.arrived[request] = time.monotonic()
            if self.complete:
                self._wake()

    def _fail(self, sending: int, error: MoeError) -> None:
        self._bus._forget(self._tokens[sending])  # noqa: SLF001 - it fails once, though the connection breaks after it
        self._errors.append((sending, error))
        self._wake()

    def _wake(self) -> None:
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    def take_errors(self) -> list[tuple[int, MoeError]]:
        """The sendings that failed since this was last asked, and how; those of answered requests among them."""
        errors, self._errors = self._errors, []
        return errors

    async def wait(self, until: float) -> bool:
        """Wait for every answer, but no longer than for the next error, or `until` on the monotonic clock.

        Returns whether every request is answered.
        """
        if self.complete or self._errors:
            return self.complete
        self._woken = asyncio.get_running_loop().create_future()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, until - time.monotonic())):
                try:
                    await self._bus._client.taken()  # noqa: SLF001
                except OSError as error:
                    if not isinstance(error, TimeoutError):
                        self._bus._fail_waiting()  # noqa: SLF001 - the connection is gone, and nothing comes by it
                await self._woken
        return self.complete

    def close(self) -> None:
        for token in self._tokens:
            self._bus._forget(token)  # noqa: SLF001

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class ReplyStream:
    """The replies to one request, in order, until closed."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._queue: asyncio.Queue[Msg | MoeError] = asyncio.Queue(STREAM_QUEUE_CHUNKS)
        self._token, self.inbox = bus._expect(self._put)  # noqa: SLF001 - one module, one mechanism

    def _put(self, item: Msg | MoeError) -> None:
        try:
            self._queue.put_nowait(item)
        except asyncio.QueueFull:
            self.fail(MoeError("overloaded", "the reader of this stream is too slow"))

    def fail(self, error: MoeError) -> None:
        """Have the reader find `error` after what it has not read yet."""
        if self._queue.full():
            self._queue.get_nowait()
        self._queue.put_nowait(error)

    @property
    def unread(self) -> bool:
        """Whether something has come that was not read yet."""
        return not self._queue.empty()

    async def next(self, timeout: float) -> bytes:
        """The next reply's bytes.

        Raises:
            MoeError: the service's error, `deadline_exceeded` after `timeout` seconds, or `bus_unavailable`.

        """
        try:
            async with asyncio.timeout(timeout):
                item = await self._queue.get()
        except TimeoutError:
            raise MoeError("deadline_exceeded", f"nothing came for {timeout:.3g} s") from None
        if isinstance(item, MoeError):
            raise item
        raise_for_error(item)
        return bytes(item.data)

    def close(self) -> None:
        self._bus._forget(self._token)  # noqa: SLF001

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def error_headers(error: MoeError) -> Headers:
    """The headers of an error reply; line breaks, which would inject protocol, become spaces."""
    text = " ".join(error.message.split())[:MAX_ERROR_CHARACTERS].encode("ascii", "replace").decode()
    return {ERROR_TEXT: text or error.code, ERROR_CODE: error.code}
