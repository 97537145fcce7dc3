"""shared/bus.py against a real nats-server, also one that stalls, dies and comes back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
import uvloop
from nats.aio.msg import Msg

from services.nats_server import binary, free_port, write_config
from shared.bus import BUDGET_MS, REQUEST_ID, Bus, NoRespondersError, Served
from shared.errors import MoeError
from tests.running import Running, answers, start, wait_until

SOON = 8.0
"""Far more than anything here takes, far less than the timeouts that must not be what ends it."""
NEVER = 120.0


@dataclass
class Server:
    """A nats-server that a test may stall, kill and start again on the same port."""

    folder: Path
    port: int
    process: Running | None = None
    stalled: bool = False

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    async def start(self) -> None:
        config = str(self.folder / "nats.conf")
        self.process = await start(self.folder, "nats-server", binary(), "--config", config)
        await wait_until(lambda: answers(self.port), "nats-server to listen", SOON)

    async def kill(self) -> None:
        assert self.process is not None
        await self.process.kill()

    async def restart(self) -> None:
        await self.kill()
        await self.start()

    def stall(self) -> None:
        """From now on it reads nothing and says nothing, but its connections stay open."""
        assert self.process is not None
        pid = self.process.process.pid
        os.kill(pid, signal.SIGSTOP)
        deadline = time.monotonic() + 5  # each of its threads stops by itself, and one of them may still answer
        while psutil.Process(pid).status() != psutil.STATUS_STOPPED and time.monotonic() < deadline:
            time.sleep(0.001)


@dataclass
class Ends:
    """Two services on one server, and what they are asked."""

    server: Server
    asking: Bus
    serving: Bus
    seen: list[bytes] = field(default_factory=list)

    async def serve(
        self, handler: Callable[[Msg], Awaitable[None]], *, capacity: int = 64, workers: int = 1, queue_group: str = ""
    ) -> Served:
        async def recorded(message: Msg) -> None:
            self.seen.append(bytes(message.data))
            await handler(message)

        served = await self.serving.serve("work", recorded, capacity=capacity, workers=workers, queue_group=queue_group)
        await in_force(self.serving)
        return served

    async def echo(self, message: Msg) -> None:
        await self.serving.reply(message, bytes(message.data))

    async def code(self, timeout: float, data: bytes = b"", subject: str = "work") -> str:
        """How a request fails."""
        with pytest.raises(MoeError) as caught:
            await self.asking.request(subject, data, timeout=timeout)
        return caught.value.code

    async def both_connected(self) -> None:
        await wait_until(lambda: self.asking.connected and self.serving.connected, "both to be connected", SOON)


async def in_force(bus: Bus) -> None:
    """Return when the server has read all that `bus` has sent: it answers one after the other."""
    with pytest.raises(NoRespondersError):
        await bus.request("nobody", b"", timeout=SOON)


@pytest_asyncio.fixture(loop_scope="session")
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    port = free_port()
    write_config(tmp_path, port)
    own = Server(tmp_path, port)
    try:
        await own.start()
        yield own
    finally:
        await own.kill()


@pytest_asyncio.fixture(loop_scope="session")
async def ends(server: Server) -> AsyncIterator[Ends]:
    asking = await Bus.connect(server.url, "asking", "asking-1")
    serving = await Bus.connect(server.url, "serving", "serving-1")
    try:
        yield Ends(server, asking, serving)
    finally:
        for bus in (asking, serving):
            await bus.abort()
            assert not bus.waiting, "a request is still waited for"


# -- exchanges -------------------------------------------------------------------------------------------------------


async def test_a_sending_fails_once_though_the_connection_breaks_after_it(ends: Ends) -> None:
    with ends.asking.exchange(1) as exchange:
        sending = exchange.send(0, "nobody", b"")
        assert not await exchange.wait(time.monotonic() + SOON)
        assert [(n, type(error)) for n, error in exchange.take_errors()] == [(sending, NoRespondersError)]
        with ends.asking.open_stream() as stream:
            await ends.server.kill()
            with pytest.raises(MoeError):  # so all that wait have been told
                await stream.next(SOON)
        late = exchange.send(0, "nobody", b"")
        assert not await exchange.wait(time.monotonic() + SOON)
        assert [(n, error.code) for n, error in exchange.take_errors()] == [(late, "bus_unavailable")]


# -- asking and answering --------------------------------------------------------------------------------------------


async def test_a_request_is_answered(ends: Ends) -> None:
    await ends.serve(ends.echo)
    assert await ends.asking.request("work", b"hello", timeout=SOON) == b"hello"
    assert await ends.asking.request("work", b"", timeout=SOON) == b""


async def test_headers_travel_along(ends: Ends) -> None:
    got: list[dict[str, str]] = []

    async def handler(message: Msg) -> None:
        got.append(dict(message.headers or {}))
        await ends.serving.reply(message, b"")

    await ends.serve(handler)
    await ends.asking.request("work", b"", timeout=SOON, headers={REQUEST_ID: "r-1", BUDGET_MS: "250"})
    assert got == [{REQUEST_ID: "r-1", BUDGET_MS: "250"}]


async def test_each_of_many_requests_gets_its_own_answer(ends: Ends) -> None:
    await ends.serve(ends.echo, capacity=200, workers=4)
    sent = [str(n).encode() for n in range(100)]
    assert await asyncio.gather(*(ends.asking.request("work", data, timeout=SOON) for data in sent)) == sent
    assert ends.asking.waiting == 0


async def test_no_answer_in_time_is_deadline_exceeded(ends: Ends) -> None:
    release = asyncio.Event()

    async def handler(_: Msg) -> None:
        await release.wait()

    await ends.serve(handler)
    async with asyncio.timeout(SOON):
        assert await ends.code(0.05) == "deadline_exceeded"
    release.set()


async def test_a_late_answer_is_not_given_to_the_next_request(ends: Ends) -> None:
    release = asyncio.Event()

    async def handler(message: Msg) -> None:
        if message.data == b"first":
            await release.wait()
        await ends.echo(message)

    await ends.serve(handler)
    assert await ends.code(0.05, b"first") == "deadline_exceeded"
    second = asyncio.create_task(ends.asking.request("work", b"second", timeout=SOON))
    await wait_until(lambda: ends.asking.waiting == 1, "the second request to be sent", SOON)
    release.set()
    assert await second == b"second"


async def test_nobody_listening_is_said_at_once(ends: Ends) -> None:
    async with asyncio.timeout(SOON):
        with pytest.raises(NoRespondersError) as caught:
            await ends.asking.request("nobody", b"", timeout=NEVER)
    assert caught.value.subject == "nobody"
    assert "nobody" in caught.value.message


async def test_of_two_sendings_the_first_answer_counts(ends: Ends) -> None:
    async def answer(message: Msg) -> None:
        await ends.serving.reply(message, message.subject.encode())

    await ends.serving.serve("second", answer)
    await in_force(ends.serving)
    with ends.asking.exchange(1) as exchange:
        assert [exchange.send(0, "first", b""), exchange.send(0, "second", b"")] == [0, 1]
        until = asyncio.get_running_loop().time() + SOON
        while not await exchange.wait(until):
            assert [(sending, type(error)) for sending, error in exchange.take_errors()] == [(0, NoRespondersError)]
        assert exchange.answers == {0: b"second"}
        assert exchange.answered_by == {0: 1}
    assert ends.asking.waiting == 0


async def test_a_sending_has_one_outcome_though_the_connection_breaks_after_it(ends: Ends) -> None:
    with ends.asking.exchange(1) as exchange:
        exchange.send(0, "nobody", b"")
        assert not await exchange.wait(asyncio.get_running_loop().time() + SOON)
        assert [sending for sending, _ in exchange.take_errors()] == [0]
        await ends.server.kill()
        await wait_until(lambda: not ends.asking.connected, "the connection to break", SOON)
        assert exchange.send(0, "nobody", b"") == 1
        assert [(sending, error.code) for sending, error in exchange.take_errors()] == [(1, "bus_unavailable")]


async def test_a_full_queue_says_overloaded_at_once(ends: Ends) -> None:
    release = asyncio.Event()

    async def handler(message: Msg) -> None:
        await release.wait()
        await ends.echo(message)

    served = await ends.serve(handler, capacity=1)
    first = asyncio.create_task(ends.asking.request("work", b"in hand", timeout=NEVER))
    await wait_until(lambda: ends.seen == [b"in hand"], "the first to be taken up", SOON)
    second = asyncio.create_task(ends.asking.request("work", b"in line", timeout=NEVER))
    await wait_until(served.queue.full, "the second to stand in line", SOON)
    async with asyncio.timeout(SOON):
        assert await ends.code(NEVER, b"too many") == "overloaded"
    assert served.refused == 1
    release.set()
    async with asyncio.timeout(SOON):
        assert list(await asyncio.gather(first, second)) == [b"in hand", b"in line"]
    assert ends.seen == [b"in hand", b"in line"]


async def test_a_handlers_own_error_reaches_the_caller(ends: Ends) -> None:
    async def handler(_: Msg) -> None:
        raise MoeError("wrong_shard", "expert 3 is not\r\nhosted here")

    served = await ends.serve(handler)
    with pytest.raises(MoeError) as caught:
        await ends.asking.request("work", b"", timeout=SOON)
    assert (caught.value.code, caught.value.message) == ("wrong_shard", "expert 3 is not hosted here")
    assert (served.requests, served.errors, served.last_error) == (1, 1, "wrong_shard")


async def test_a_handlers_bug_is_an_internal_error_without_its_text(ends: Ends) -> None:
    async def handler(message: Msg) -> None:
        if message.data == b"bug":
            raise ValueError("the password is hunter2")
        await ends.echo(message)

    served = await ends.serve(handler)
    with pytest.raises(MoeError) as caught:
        await ends.asking.request("work", b"bug", timeout=SOON)
    assert caught.value.code == "internal_error"
    assert "hunter2" not in caught.value.message
    assert served.last_error == "internal_error"
    assert await ends.asking.request("work", b"next", timeout=SOON) == b"next"


async def test_a_message_without_a_reply_subject_needs_no_answer(ends: Ends) -> None:
    async def handler(message: Msg) -> None:
        if message.data == b"one way":
            raise MoeError("bad_message", "nobody hears this")
        await ends.echo(message)

    await ends.serve(handler)
    await ends.asking.publish("work", b"one way")
    assert await ends.asking.request("work", b"next", timeout=SOON) == b"next"
    assert ends.seen == [b"one way", b"next"]


async def test_a_queue_group_shares_the_work(ends: Ends) -> None:
    await ends.serve(ends.echo, queue_group="group")
    await ends.serve(ends.echo, queue_group="group")
    for n in range(20):
        await ends.asking.request("work", str(n).encode(), timeout=SOON)
    assert len(ends.seen) == 20


async def test_stopping_finishes_what_was_taken_and_takes_nothing_new(ends: Ends) -> None:
    release = asyncio.Event()

    async def handler(message: Msg) -> None:
        await release.wait()
        await ends.echo(message)

    served = await ends.serve(handler)
    taken = [asyncio.create_task(ends.asking.request("work", data, timeout=NEVER)) for data in (b"1", b"2")]
    await wait_until(lambda: served.queue.qsize() == 1 and ends.seen, "one to be taken up, one in line", SOON)
    stopping = asyncio.create_task(served.stop_taking())
    async with asyncio.timeout(SOON):
        while True:
            try:
                await ends.asking.request("work", b"new", timeout=0.1)
            except NoRespondersError:
                break
            except MoeError as error:
                assert error.code == "deadline_exceeded", "it stood in line before the stop"  # noqa: PT017
        release.set()
        assert await asyncio.gather(*taken) == [b"1", b"2"]
        await stopping


async def test_a_payload_over_the_limit_is_an_error_of_its_own(ends: Ends) -> None:
    await ends.serve(ends.echo)
    limit = ends.asking.max_payload
    async with asyncio.timeout(SOON):
        assert await ends.code(NEVER, b"x" * (limit + 1)) == "payload_too_large"
        assert ends.seen == []
        assert len(await ends.asking.request("work", b"x" * limit, timeout=SOON)) == limit
    assert ends.asking.connected


async def test_an_answer_over_the_limit_is_an_error_of_its_own(ends: Ends) -> None:
    async def handler(message: Msg) -> None:
        await ends.serving.reply(message, b"x" * (ends.serving.max_payload + 1))

    await ends.serve(handler)
    async with asyncio.timeout(SOON):
        assert await ends.code(NEVER) == "payload_too_large"
    assert ends.serving.connected


async def test_a_full_message_with_full_headers_is_within_the_servers_limit(ends: Ends) -> None:
    await ends.serve(ends.echo)
    headers = {REQUEST_ID: "r" * 2048, BUDGET_MS: "30000", "traceparent": "0" * 55}
    data = b"x" * ends.asking.max_payload
    assert len(await ends.asking.request("work", data, timeout=SOON, headers=headers)) == len(data)


# -- streams ---------------------------------------------------------------------------------------------------------


async def test_a_streams_replies_come_in_order_and_an_error_ends_it(ends: Ends) -> None:
    async def handler(message: Msg) -> None:
        for n in range(50):
            await ends.serving.reply(message, str(n).encode())
        raise MoeError("shard_unavailable", "expert shard 1 is unavailable")

    await ends.serve(handler)
    with ends.asking.open_stream() as stream:
        await ends.asking.publish("work", b"", reply=stream.inbox)
        assert [await stream.next(SOON) for _ in range(50)] == [str(n).encode() for n in range(50)]
        with pytest.raises(MoeError) as caught:
            await stream.next(SOON)
    assert caught.value.code == "shard_unavailable"
    assert ends.asking.waiting == 0


async def test_a_silent_stream_is_deadline_exceeded(ends: Ends) -> None:
    with ends.asking.open_stream() as stream:
        with pytest.raises(MoeError) as caught:
            await stream.next(0.05)
        assert caught.value.code == "deadline_exceeded"


async def test_a_stream_that_nobody_serves_says_so(ends: Ends) -> None:
    with ends.asking.open_stream() as stream:
        await ends.asking.publish("nobody", b"", reply=stream.inbox)
        with pytest.raises(NoRespondersError):
            await stream.next(NEVER)


async def test_what_comes_after_a_stream_was_left_reaches_nobody(ends: Ends) -> None:
    release = asyncio.Event()

    async def handler(message: Msg) -> None:
        await ends.serving.reply(message, b"first")
        await release.wait()
        await ends.serving.reply(message, b"late")

    await ends.serve(handler)
    with ends.asking.open_stream() as stream:
        await ends.asking.publish("work", b"", reply=stream.inbox)
        assert await stream.next(SOON) == b"first"
    release.set()
    with ends.asking.open_stream() as other:
        await ends.asking.publish("nobody", b"", reply=other.inbox)
        with pytest.raises(NoRespondersError):
            await other.next(SOON)


# -- watching --------------------------------------------------------------------------------------------------------


async def test_one_message_that_the_watcher_cannot_take_does_not_stop_the_watching(ends: Ends) -> None:
    seen: list[bytes] = []

    def callback(message: Msg) -> None:
        seen.append(bytes(message.data))
        if message.data == b"bad":
            raise ValueError("bad")

    await ends.serving.watch("news.>", callback)
    await in_force(ends.serving)
    for data in (b"1", b"bad", b"2"):
        await ends.asking.publish("news.today", data)
    await wait_until(lambda: seen == [b"1", b"bad", b"2"], "all the news", SOON)


async def test_a_flush_comes_after_all_that_was_sent_before_it() -> None:
    # With a real server it is a race that is mostly won; here the order of the lines is seen.
    lines: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"s","version":"2.12.0","max_payload":1048576,"headers":true}\r\n')
        while line := await reader.readline():
            lines.append(line.split()[0])
            if line == b"PING\r\n":
                writer.write(b"PONG\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        bus = await Bus.connect(f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}", "serving", "serving-1")
        await bus.flush()
        lines.clear()
        await bus.watch("news.>", lambda _: None)
        await bus.flush()
        await bus.abort()
    assert lines[:2] == [b"SUB", b"PING"]


# -- when the connection breaks --------------------------------------------------------------------------------------


async def test_a_dead_server_fails_what_waits_at_once_and_a_new_one_is_found(ends: Ends) -> None:
    stuck = asyncio.Event()

    async def handler(message: Msg) -> None:
        if message.data == b"stuck":
            await stuck.wait()
        await ends.echo(message)

    await ends.serve(handler, workers=8)
    with ends.asking.open_stream() as stream:
        await ends.asking.publish("work", b"stuck", reply=stream.inbox)
        requests = [asyncio.create_task(ends.code(NEVER, b"stuck")) for _ in range(3)]
        await wait_until(lambda: len(ends.seen) == 4, "all to be taken up", SOON)
        await ends.server.kill()
        async with asyncio.timeout(SOON):
            assert await asyncio.gather(*requests) == ["bus_unavailable"] * 3
            with pytest.raises(MoeError) as caught:
                await stream.next(NEVER)
            assert caught.value.code == "bus_unavailable"
            assert await ends.code(NEVER, b"while it is down") == "bus_unavailable"
            with pytest.raises(MoeError) as caught:
                await ends.asking.publish("work", b"while it is down")
            assert caught.value.code == "bus_unavailable"
        stuck.set()
    await ends.server.start()
    await ends.both_connected()
    assert await ends.asking.request("work", b"after", timeout=SOON) == b"after"
    assert b"while it is down" not in ends.seen, "something stale was delivered"


async def test_a_server_that_stalls_with_bytes_unsent_gets_nothing_stale_after_it_died(ends: Ends) -> None:
    # The asking end serves as well: its subscription is surely back before anything else of it is sent.
    ends.serving, ends.asking = ends.asking, ends.asking
    await ends.serve(ends.echo, capacity=1000)
    ends.server.stall()
    data = b"x" * 2**20
    large = [asyncio.create_task(ends.code(NEVER, data)) for _ in range(24)]
    await wait_until(lambda: ends.asking.waiting == 24, "more than the socket takes to be sent", SOON)
    small = [asyncio.create_task(ends.code(NEVER, b"stale")) for _ in range(5)]
    await wait_until(lambda: ends.asking.waiting == 29, "the small ones to stand behind it", SOON)
    await ends.server.restart()
    async with asyncio.timeout(SOON):
        assert set(await asyncio.gather(*large, *small)) == {"bus_unavailable"}
    await ends.both_connected()
    assert await ends.asking.request("work", b"after", timeout=SOON) == b"after"
    assert ends.seen == [b"after"], "something stale was delivered"


async def test_a_flush_that_was_given_up_does_not_harm_the_connection(ends: Ends) -> None:
    async def answer(message: Msg) -> None:
        await ends.serving.reply(message, b"here")

    await ends.serving.serve("echo", answer)
    await in_force(ends.serving)
    before = ends.asking.connection
    assert ends.server.process is not None
    ends.server.stall()
    with pytest.raises(MoeError):
        await ends.asking.flush(0.1)
    os.kill(ends.server.process.process.pid, signal.SIGCONT)
    assert await ends.asking.request("echo", b"", timeout=SOON) == b"here"
    assert ends.asking.connection == before, "the same connection serves on"


async def test_a_server_that_stalls_with_bytes_unsent_is_given_up(ends: Ends) -> None:
    ends.asking._client.options["ping_interval"] = 0.2  # from the second ping on; pings notice a half-open link
    ends.server.stall()
    data = b"x" * 2**20
    requests = [asyncio.create_task(ends.code(NEVER, data)) for _ in range(24)]
    try:
        async with asyncio.timeout(SOON):
            assert list(await asyncio.gather(*requests)) == ["bus_unavailable"] * 24
    finally:
        await ends.server.restart()
        await asyncio.gather(*requests, return_exceptions=True)
        await ends.both_connected()


async def test_leaving_a_server_that_stalls_takes_no_longer_than_a_flush(ends: Ends) -> None:
    leaving = await Bus.connect(ends.server.url, "leaving", "leaving-1")
    ends.server.stall()
    sent = [asyncio.create_task(leaving.publish("work", b"x" * 2**20)) for _ in range(24)]
    await wait_until(lambda: any(each.done() for each in sent), "some to be on their way", SOON)
    assert not all(each.done() for each in sent), "the network took it all, so nothing is unsent"
    task = asyncio.create_task(leaving.abort())
    try:
        async with asyncio.timeout(SOON):
            await asyncio.shield(task)
    finally:
        await ends.server.restart()
        with contextlib.suppress(OSError):
            await task
        await asyncio.gather(*sent, return_exceptions=True)
        await ends.both_connected()


HEADERS = {
    "no header at all": b"NATS/1.0\r\n\r\n",
    "no UTF-8": b"NATS/1.0\r\n\xff\xfe: x\r\n\r\n",
    "no colon": b"NATS/1.0\r\nno colon\r\n\r\n",
    "a status of its own": b"NATS/1.0 503\r\n\r\n",
    "a budget of words": b"NATS/1.0\r\nMoe-Budget-Ms: soon\r\n\r\n",
    "nothing": b"",
    "one line end": b"NATS/1.0\r\n",
}
DEADLY = {
    "three bytes": b"abc",
    "a status that is no UTF-8": b"NATS/1.0 \xff\xff\xff\r\n\r\n",
}


async def survives(ends: Ends, headers: bytes) -> None:
    """Whether a service still answers after a message with these raw headers."""
    await ends.serve(ends.echo)
    reader, writer = await asyncio.open_connection("127.0.0.1", ends.server.port)
    try:
        await reader.readline()
        writer.write(b'CONNECT {"verbose":false,"headers":true,"lang":"raw","version":"1","protocol":1}\r\n')
        writer.write(b"HPUB work %d %d\r\n%sx\r\nPING\r\n" % (len(headers), len(headers) + 1, headers))
        await writer.drain()
        async with asyncio.timeout(SOON):
            while not (await reader.readline()).startswith(b"PONG"):
                pass
        assert await ends.asking.request("work", b"after", timeout=2) == b"after"
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@pytest.mark.parametrize("headers", HEADERS.values(), ids=HEADERS)
async def test_odd_headers_do_not_silence_a_service(ends: Ends, headers: bytes) -> None:
    await survives(ends, headers)


@pytest.mark.parametrize("headers", DEADLY.values(), ids=DEADLY)
async def test_malformed_headers_do_not_silence_a_service(ends: Ends, headers: bytes) -> None:
    await survives(ends, headers)


# -- connecting ------------------------------------------------------------------------------------------------------


async def test_no_server_is_bus_unavailable_after_the_given_time() -> None:
    async with asyncio.timeout(SOON):
        with pytest.raises(MoeError) as caught:
            await Bus.connect(f"nats://127.0.0.1:{free_port()}", "asking", "asking-1", wait_seconds=0.2)
    assert caught.value.code == "bus_unavailable"


async def test_a_server_that_starts_later_is_waited_for(tmp_path: Path) -> None:
    port = free_port()
    write_config(tmp_path, port)
    server = Server(tmp_path, port)
    connecting = asyncio.create_task(Bus.connect(server.url, "asking", "asking-1", wait_seconds=NEVER))
    try:
        await server.start()
        async with asyncio.timeout(SOON):
            bus = await connecting
        await bus.abort()
    finally:
        connecting.cancel()
        await server.kill()


async def test_a_transport_that_broke_a_moment_ago_is_no_bug_of_ours(nats_url: str) -> None:
    """Under uvloop, as services run: what is written before nats-py learns of the break must not raise RuntimeError."""

    async def use_it() -> tuple[str, str]:
        bus = await Bus.connect(nats_url, "test", "breaking")
        codes = []
        try:
            bus._client._transport._io_writer.transport.abort()
            assert bus._client.is_connected, "nats-py knows already: this test shows nothing"
            for asking in (bus.publish("x", b"y"), bus.request("x", b"y", timeout=SOON)):
                try:
                    await asking
                except MoeError as error:
                    codes.append(error.code)
            bus.reply_error(Msg(_client=bus._client, subject="x", reply="y", data=b""), MoeError("overloaded", "full"))
        finally:
            await bus.abort()
        return codes[0], codes[1]

    assert await asyncio.to_thread(lambda: uvloop.run(use_it())) == ("bus_unavailable", "bus_unavailable")
