"""A simulated nats-server, and connections to it that shared/bus.py takes for those of shared/nats_connection.py.

As with the real one: each connection is a TCP stream, in order; between connections there is no order. A message is
delivered at most once: what is under way when a connection breaks is lost, and its sender is not told. A queue group
gets a message at one member, drawn at random, who may have died a moment ago. Who asks where nobody listens is told so.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import nats.errors
from nats.aio.msg import Msg

from services.router.calls import FREE
from shared.bus import ERROR_CODE
from shared.nats_connection import header_block
from tests.simulation.loop import NOBODY, Process, SimulatedLoop, process

MAX_PAYLOAD = 1024 * 1024
LONGEST_SPIKE_SECONDS = 0.3
NO_RESPONDERS = {"Status": "503"}

Tell = Callable[[str], None]


@dataclass(eq=False)
class Subscription:
    """One subscription of one connection."""

    client: SimulatedConnection
    sid: int
    subject: str
    queue: str
    callback: Callable[[Msg], None]

    async def drain(self) -> None:
        """Take nothing new; return when what was on its way is there. As nats-py's, with callbacks that run at once."""
        self.client.write(("unsub", self.sid))
        await self.client.flush()
        self.client.forget(self.sid)


@dataclass(eq=False)
class Session:
    """One TCP connection: what is on its way in both directions."""

    client: SimulatedConnection
    broken: bool = False
    """Nothing arrives any more, at neither end."""
    blocked: bool = False
    """The network between the ends is away; what is sent waits."""
    to_server: list[Any] = field(default_factory=list)
    to_client: list[Any] = field(default_factory=list)
    last_to_server: float = 0.0
    last_to_client: float = 0.0
    subscriptions: dict[int, Subscription] = field(default_factory=dict)


class SimulatedServer:
    """A nats-server, and the network to it."""

    def __init__(self, loop: SimulatedLoop, draw: random.Random, tell: Tell, *, latency: float, spikes: float) -> None:
        self.loop = loop
        self.up = True
        self.away: set[str] = set()
        """Processes that cannot reach the server."""
        self.sessions: dict[Session, None] = {}
        self.messages = 0
        self.lost = 0
        self.calls: Counter[str] = Counter()
        """Messages to expert workers, by the process that sent them."""
        self.refusals: Counter[str] = Counter()
        """Answers to processes that say that nobody has begun to work, and what was under way when they lost NATS."""
        self.under_way: Callable[[Process], int] = lambda _: 0
        self.digest = 0
        self._draw = draw
        self._tell = tell
        self._latency = latency
        self._spikes = spikes
        self._exact: dict[str, list[tuple[Session, Subscription]]] = {}
        self._star: dict[str, list[tuple[Session, Subscription]]] = {}
        self._tail: dict[str, list[tuple[Session, Subscription]]] = {}

    def latency(self) -> float:
        """Of one way, in seconds."""
        draw = self._draw.random()
        if draw < self._spikes:
            return self._draw.random() * min(100 * self._latency, LONGEST_SPIKE_SECONDS)
        return self._latency * (0.2 + draw)

    def connect(self, client: SimulatedConnection) -> Session | None:
        """A new session, if the server can be reached."""
        if not self.up or client.process.dead or client.process.name in self.away:
            return None
        session = Session(client)
        self.sessions[session] = None
        return session

    # -- the network -------------------------------------------------------------------------------------------------

    def send_to_server(self, session: Session, item: tuple[Any, ...]) -> None:
        if session.broken:
            self.lost += 1
        elif session.blocked:
            session.to_server.append(item)
        else:
            at = session.last_to_server = max(session.last_to_server, self.loop.time() + self.latency())
            self.loop.call_at(at, self._arrive, session, item, context=NOBODY)

    def send_to_client(self, session: Session, item: tuple[Any, ...]) -> None:
        if session.broken:
            self.lost += 1
        elif session.blocked:
            session.to_client.append(item)
        else:
            at = session.last_to_client = max(session.last_to_client, self.loop.time() + self.latency())
            self.loop.call_at(at, session.client.arrive, session, item, context=session.client.process.context)

    def crash(self) -> None:
        """Every connection breaks, and none can be made until `start`."""
        self.up = False
        for session in list(self.sessions):
            self.reset(session)

    def start(self) -> None:
        self.up = True

    def reset(self, session: Session) -> None:
        """Break a connection: what is under way is lost, both ends are told."""
        session.broken = True
        self.lost += len(session.to_server) + len(session.to_client)
        self._end(session)
        client = session.client
        self.loop.call_later(self.latency(), client.lose, session, context=client.process.context)

    def close(self, session: Session) -> None:
        """The client's end is gone: what it has sent arrives, what is sent to it does not."""
        if session.blocked:
            session.broken = True
            self._end(session)
        else:
            self.send_to_server(session, ("close",))

    def block(self, name: str, seconds: float, notice_seconds: float) -> None:
        """Cut a process off for a while. Its end gives a connection up after `notice_seconds` of silence."""
        self.away.add(name)
        for session in [s for s in self.sessions if s.client.process.name == name]:
            session.blocked = True
            if notice_seconds < seconds:
                self.loop.call_later(
                    notice_seconds, session.client.lose, session, context=session.client.process.context
                )
        self.loop.call_later(seconds, self._unblock, name, context=NOBODY)

    def _unblock(self, name: str) -> None:
        self.away.discard(name)
        for session in [s for s in self.sessions if s.client.process.name == name and s.blocked]:
            session.blocked = False
            if session.client.session is not session:  # the peer's kernel knows this connection no more
                self.lost += len(session.to_client)
                session.broken = True
                self._end(session)
                continue
            to_server, session.to_server = session.to_server, []
            to_client, session.to_client = session.to_client, []
            for item in to_server:
                self.send_to_server(session, item)
            for item in to_client:
                self.send_to_client(session, item)

    # -- the server --------------------------------------------------------------------------------------------------

    def _arrive(self, session: Session, item: tuple[Any, ...]) -> None:
        if session.broken:
            self.lost += 1
            return
        kind = item[0]
        if kind == "pub":
            self._publish(session, *item[1:])
        elif kind == "sub":
            self._subscribe(session, item[1])
        elif kind == "unsub":
            self._unsubscribe(session, item[1])
        elif kind == "ping":
            self.send_to_client(session, ("pong", item[1]))
        else:
            session.broken = True
            self._end(session)

    def _table(self, subject: str) -> tuple[dict[str, list[tuple[Session, Subscription]]], str]:
        if subject.endswith(".>"):
            return self._tail, subject[:-1]
        if subject.endswith(".*"):
            return self._star, subject[:-2]
        return self._exact, subject

    def _subscribe(self, session: Session, subscription: Subscription) -> None:
        session.subscriptions[subscription.sid] = subscription
        table, key = self._table(subscription.subject)
        table.setdefault(key, []).append((session, subscription))

    def _unsubscribe(self, session: Session, sid: int) -> None:
        subscription = session.subscriptions.pop(sid, None)
        if subscription is not None:
            table, key = self._table(subscription.subject)
            table[key].remove((session, subscription))
            if not table[key]:
                del table[key]

    def _end(self, session: Session) -> None:
        self.sessions.pop(session, None)
        for sid in list(session.subscriptions):
            self._unsubscribe(session, sid)

    def _publish(self, session: Session, subject: str, reply: str, data: bytes, headers: dict[str, str] | None) -> None:
        self.messages += 1
        line = f"{self.loop.time():.6f} {session.client.name} {subject} {len(data)} {zlib.crc32(data):08x}"
        self.digest = zlib.crc32(line.encode(), self.digest)
        self._tell(line)
        if ".experts." in subject or ".worker." in subject:
            self.calls[session.client.process.name] += 1
        found = [
            *self._exact.get(subject, ()),
            *self._star.get(subject.rpartition(".")[0], ()),
            *(pair for head, pairs in self._tail.items() if subject.startswith(head) for pair in pairs),
        ]
        groups: dict[str, list[tuple[Session, Subscription]]] = {}
        for pair in found:
            if pair[1].queue:
                groups.setdefault(pair[1].queue, []).append(pair)
            else:
                self.send_to_client(pair[0], ("msg", pair[1].sid, subject, reply, data, headers))
        for members in groups.values():
            to, subscription = members[int(self._draw.random() * len(members))]
            self.send_to_client(to, ("msg", subscription.sid, subject, reply, data, headers))
        if not found and reply:
            for to, subscription in self._star.get(reply.rpartition(".")[0], ()):
                if to is session:
                    self.send_to_client(to, ("msg", subscription.sid, reply, "", b"", NO_RESPONDERS))


class SimulatedConnection:
    """What shared/bus.py uses of a Connection, on a simulated network."""

    server: SimulatedServer
    """Of the world that runs; set on a subclass."""

    def __init__(self) -> None:
        owner = process.get()
        assert owner is not None, "only a process connects"
        self.process: Process = owner
        self.session: Session | None = None
        self.options: dict[str, Any] = {}
        self.max_payload = MAX_PAYLOAD
        self.is_closed = False
        self.stats = {"reconnects": 0}
        self.name = ""
        self._subscriptions: dict[int, Subscription] = {}
        self._sids = itertools.count(1)
        self._pings: dict[int, asyncio.Future[None]] = {}
        self._numbers = itertools.count(1)
        self._reconnecting: asyncio.Task[None] | None = None
        self._disconnected: Callable[[], Awaitable[None]] | None = None
        self._reconnected: Callable[[], Awaitable[None]] | None = None

    @property
    def is_connected(self) -> bool:
        return self.session is not None and not self.is_closed

    @property
    def can_send(self) -> bool:
        return self.is_connected

    async def connect(self, _url: str, **options: Any) -> None:
        self.options = options
        self.name = str(options["name"])
        self._disconnected = options["disconnected_cb"]
        self._reconnected = options["reconnected_cb"]
        if not await self._reach():
            raise nats.errors.NoServersError

    async def _reach(self) -> bool:
        await asyncio.sleep(4 * self.server.latency())
        self.session = self.server.connect(self)
        return self.session is not None

    # -- sending -----------------------------------------------------------------------------------------------------

    def write(self, item: tuple[Any, ...]) -> None:
        if self.session is not None and not self.process.dead:
            self.server.send_to_server(self.session, item)

    def send(self, subject: str, reply: str, payload: bytes, head: bytes) -> None:
        self.write(("pub", subject, reply, bytes(payload), parsed(head)))

    async def publish(
        self, subject: str, payload: bytes = b"", reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        if self.is_closed:
            raise nats.errors.ConnectionClosedError
        if not self.is_connected:
            raise nats.errors.OutboundBufferLimitError
        if len(payload) > self.max_payload:
            raise nats.errors.MaxPayloadError
        self.send(subject, reply, payload, header_block(headers))

    async def taken(self) -> None:
        """The network takes as much as comes."""

    async def flush(self, timeout: float = 10) -> None:
        if self.is_closed:
            raise nats.errors.ConnectionClosedError
        number = next(self._numbers)
        pong = self._pings[number] = asyncio.get_running_loop().create_future()
        self.write(("ping", number))
        try:
            async with asyncio.timeout(timeout):
                await pong
        except TimeoutError:
            raise nats.errors.FlushTimeoutError from None
        finally:
            self._pings.pop(number, None)

    # -- receiving ---------------------------------------------------------------------------------------------------

    async def listen(self, subject: str, callback: Callable[[Msg], None], *, queue_group: str = "") -> Subscription:
        if self.is_closed:
            raise nats.errors.ConnectionClosedError
        subscription = Subscription(self, next(self._sids), subject, queue_group, callback)
        self._subscriptions[subscription.sid] = subscription
        self.write(("sub", subscription))
        return subscription

    def forget(self, sid: int) -> None:
        self._subscriptions.pop(sid, None)

    def arrive(self, session: Session, item: tuple[Any, ...]) -> None:
        """Called in the process, when it runs."""
        if session.broken or session is not self.session or self.process.dead:
            self.server.lost += 1
            return
        if item[0] == "pong":
            pong = self._pings.get(item[1])
            if pong is not None and not pong.done():
                pong.set_result(None)
            return
        _, sid, subject, reply, data, headers = item
        subscription = self._subscriptions.get(sid)
        if headers and (headers.get("Status") == "503" or headers.get(ERROR_CODE) in FREE):
            self.server.refusals[self.process.name] += 1
        if subscription is not None:
            fresh = None if headers is None else dict(headers)
            subscription.callback(Msg(_client=self, subject=subject, reply=reply, data=data, headers=fresh, _sid=sid))

    # -- breaking ----------------------------------------------------------------------------------------------------

    def lose(self, session: Session) -> None:
        """This end notices that the connection is gone."""
        if session is self.session and not self.is_closed and not self.process.dead:
            self.session = None
            self.server.refusals[self.process.name] += self.server.under_way(self.process)
            self._reconnecting = asyncio.get_running_loop().create_task(self._reconnect())

    async def _reconnect(self) -> None:
        assert self._disconnected is not None
        assert self._reconnected is not None
        await self._disconnected()
        while not await self._reach():
            await asyncio.sleep(self.options["reconnect_time_wait"])
        self.stats["reconnects"] += 1
        for subscription in self._subscriptions.values():
            self.write(("sub", subscription))
        await self._reconnected()

    def drop_unsent(self) -> None:
        """Forget what the network has not taken; it has taken all."""
        if self.session is not None:
            self.server.close(self.session)

    async def close(self) -> None:
        if self.is_closed:
            return
        if self.session is not None:
            self.server.close(self.session)
        self.session = None
        self.is_closed = True
        if self._reconnecting is not None:
            self._reconnecting.cancel()
        self._subscriptions.clear()
        if self._disconnected is not None:
            await self._disconnected()

    def sever(self) -> None:
        """The process is killed: its kernel closes the connection."""
        if self.session is not None:
            self.server.close(self.session)
        self.session = None


_heads: dict[bytes, dict[str, str] | None] = {b"": None}


def parsed(head: bytes) -> dict[str, str] | None:
    """The headers in what `header_block` made."""
    if head in _heads:
        return _heads[head]
    lines = head.decode().split("\r\n")[1:]
    headers = dict(line.split(": ", 1) for line in lines if line)
    if len(_heads) > 4096:
        _heads.clear()
        _heads[b""] = None
    _heads[head] = headers
    return headers
