"""The load generator's HTTP client against real servers, good and bad."""

from __future__ import annotations

import asyncio

import pytest

from services.benchmark_http import Client, TransferError, refusal
from services.nats_server import free_port
from shared.errors import StartError
from tests.benchmark.servers import Answering, chunked, serving, whole


async def ask(url: str, body: bytes = b"") -> tuple[int, bytes, bytes]:
    """(status, the body of a 200, the body of anything else)."""
    client, pieces = Client(url), list[bytes]()
    try:
        async with asyncio.timeout(10):
            status, refused = await client.ask("POST", "/path", body, pieces.append)
    finally:
        client.close()
    return status, b"".join(pieces), refused


def always(answer: bytes, *, close: bool = False) -> Answering:
    async def send(_body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        if close:
            await writer.drain()
            writer.close()

    return send


async def test_bodies_come_whole_however_they_are_framed() -> None:
    for answer in (whole(b"hello"), chunked(b"he", b"llo"), chunked(b"h", b"e", b"l", b"l", b"o")):
        async with serving(always(answer)) as url:
            assert await ask(url, b"x" * 100_000) == (200, b"hello", b"")
    async with serving(always(b"HTTP/1.0 200 OK\r\n\r\nhello", close=True)) as url:
        assert await ask(url) == (200, b"hello", b"")


async def test_an_error_keeps_its_body() -> None:
    async with serving(always(whole(b'{"error": {"message": "no", "code": "overloaded"}}', "429 Too Many"))) as url:
        status, body, refused = await ask(url)
    assert (status, body) == (429, b"")
    assert (refusal(refused).code, refusal(refused).message) == ("overloaded", "no")
    assert refusal(b"<html>bad gateway").message == "<html>bad gateway"


@pytest.mark.parametrize(
    "answer",
    [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf", b"nonsense\r\n\r\n", chunked(b"x")[:-5]],
    ids=["nothing", "half a body", "no HTTP", "half a chunk"],
)
async def test_a_broken_answer_is_an_error_and_never_a_wait(answer: bytes) -> None:
    async with serving(always(answer, close=True)) as url:
        with pytest.raises(TransferError):
            await ask(url)


async def test_connections_are_used_again() -> None:
    seen: set[object] = set()

    async def answer(_body: bytes, writer: asyncio.StreamWriter) -> None:
        seen.add(writer)
        writer.write(whole(b"{}"))

    async with serving(answer) as url:
        client = Client(url)
        for _ in range(5):
            assert await client.json("GET", "/") == (200, {})
        client.close()
    assert len(seen) == 1


async def test_the_key_and_the_prefix_are_sent() -> None:
    heads: list[bytes] = []

    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        heads.append(request)
        writer.write(whole(b"{}"))

    async with serving(answer) as url:
        client = Client(f"{url}/behind/", "a-secret")
        await client.json("POST", "/v1/models", {"a": 1})
        client.close()
    assert heads[0].startswith(b"post /behind/v1/models http/1.1\r\n")
    assert b"\r\nauthorization: bearer a-secret\r\n" in heads[0]
    assert heads[0].endswith(b'\r\n\r\n{"a":1}')


async def test_nobody_there() -> None:
    with pytest.raises(TransferError, match="cannot connect"):
        await ask(f"http://127.0.0.1:{free_port()}")


@pytest.mark.parametrize("url", ["", "ftp://host", "http://", "http://host:port", "http://[::1"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(StartError):
        Client(url)


def test_a_key_cannot_add_headers() -> None:
    with pytest.raises(StartError):
        Client("http://host", "key\r\nX-Other: 1")
