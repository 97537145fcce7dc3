"""The proxy does to bytes what the fault tests say it does."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest

from tests.faults.proxy import Proxy, proxying
from tests.running import wait_until


@contextlib.asynccontextmanager
async def echo() -> AsyncIterator[int]:
    """The port of a server that sends back what it gets."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(100):
            writer.write(piece)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield int(server.sockets[0].getsockname()[1])


@contextlib.asynccontextmanager
async def connected(proxy: Proxy) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def test_bytes_pass_and_a_cut_ends_them_until_it_listens_again() -> None:
    async with echo() as port, proxying(port) as proxy:
        async with connected(proxy) as (reader, writer):
            writer.write(b"one")
            assert await reader.readexactly(3) == b"one"
            await proxy.cut()
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", proxy.port)
        await proxy.listen()
        async with connected(proxy) as (reader, writer):
            writer.write(b"two")
            assert await reader.readexactly(3) == b"two"


async def test_held_bytes_come_later_in_their_order() -> None:
    async with echo() as port, proxying(port) as proxy, connected(proxy) as (reader, writer):
        proxy.hold()
        writer.write(b"one")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await reader.read(3)
        writer.write(b"two")
        proxy.release()
        assert await reader.readexactly(6) == b"onetwo"


async def test_a_delay_holds_for_each_direction() -> None:
    async with echo() as port, proxying(port) as proxy, connected(proxy) as (reader, writer):
        proxy.delay = 0.1
        start = time.monotonic()
        writer.write(b"one")
        assert await reader.readexactly(3) == b"one"
        assert time.monotonic() - start >= 0.2


async def test_it_ends_connections_whose_other_end_is_gone() -> None:
    async with echo() as port:
        pass
    async with proxying(port) as proxy, connected(proxy) as (reader, _):
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        await wait_until(lambda: proxy.connections == 0, "the connection to be forgotten")
