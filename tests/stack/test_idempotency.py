"""Idempotency-Key on a running stack: what is drawn at random can only be the same again if it is not computed again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from services.nats_server import free_port
from tests.real_redis import RealRedis, needs_redis
from tests.running import Running, Stack, start_service, wait_until
from tests.stack.looking import http

DRAWN: dict[str, Any] = {"prompt": "def read(", "max_tokens": 200, "ignore_eos": True, "temperature": 1.0}
METRIC = "moe_idempotent_requests_total"


def key() -> dict[str, str]:
    return {"Idempotency-Key": str(uuid.uuid4())}


async def counted(client: httpx.AsyncClient, result: str) -> float:
    lines = (await client.get("/metrics")).text.splitlines()
    (line,) = [line for line in lines if line.startswith(f'{METRIC}{{result="{result}"}}')]
    return float(line.split()[-1])


def text_of(stream: str) -> str:
    """The text of a whole stream of completions."""
    *events, done = [line.removeprefix("data: ") for line in stream.splitlines() if line]
    assert done == "[DONE]"
    return "".join(choice["text"] for event in events for choice in json.loads(event)["choices"])


@pytest_asyncio.fixture(loop_scope="session")
async def client(stack: Stack) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


async def test_the_openai_package_gets_the_first_answer_again(client: AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "prompt": "import ", "max_tokens": 24, "temperature": 1.0}
    name = key()
    first = await client.completions.create(**asked, extra_headers=name)
    raw = await client.completions.with_raw_response.create(**asked, extra_headers=name)
    other = await client.completions.create(**asked, extra_headers=key())
    assert raw.headers["idempotency-replayed"] == "true"
    assert raw.parse() == first
    assert other.id != first.id


async def test_the_openai_package_streams_the_first_chat_again(client: AsyncOpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "demo",
        "messages": [{"role": "user", "content": "sort a list"}],
        "max_tokens": 24,
        "temperature": 1.0,
        "stream": True,
    }
    name = key()
    first, again = [
        [chunk async for chunk in await client.chat.completions.create(**asked, extra_headers=name)] for _ in range(2)
    ]
    assert again == first


async def test_the_openai_package_is_told_of_a_mismatch(client: AsyncOpenAI) -> None:
    name = key()
    await client.completions.create(model="demo", prompt="import ", max_tokens=2, extra_headers=name)
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        await client.completions.create(model="demo", prompt="class ", max_tokens=2, extra_headers=name)
    assert caught.value.code == "idempotency_mismatch"


async def test_a_refused_request_leaves_its_key_free(client: AsyncOpenAI) -> None:
    name = key()
    with pytest.raises(openai.BadRequestError):
        await client.completions.create(model="demo", prompt="import ", max_tokens=-1, extra_headers=name)
    await client.completions.create(model="demo", prompt="import ", max_tokens=2, extra_headers=name)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_repeat_while_the_first_runs(stack: Stack, stream: bool) -> None:
    async with http(stack) as client:
        before = await counted(client, "joined")
        name = key()
        asked = [
            asyncio.create_task(client.post("/v1/completions", json={**DRAWN, "stream": stream}, headers=name))
            for _ in range(3)
        ]
        answers = await asyncio.gather(*asked)
        assert await counted(client, "joined") == before + 2
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert len({answer.content for answer in answers}) == 1
    assert [answer.headers.get("idempotency-replayed") for answer in answers].count("true") == 2
    assert len({answer.headers["x-request-id"] for answer in answers}) == 3


async def test_the_first_client_breaks_off_mid_stream_and_its_retry_gets_the_whole_text(stack: Stack) -> None:
    name, body = key(), {**DRAWN, "max_tokens": 500, "stream": True}
    async with http(stack) as client:
        seen: list[str] = []
        async with client.stream("POST", "/v1/completions", json=body, headers=name) as first:
            async for line in first.aiter_lines():
                seen += [line] if line else []
                if len(seen) == 5:
                    break
        again = await client.post("/v1/completions", json=body, headers=name)
        third = await client.post("/v1/completions", json=body, headers=name)
    lines = [line for line in again.text.splitlines() if line]
    assert again.headers["idempotency-replayed"] == "true"
    assert lines[:5] == seen
    assert len(text_of(again.text)) > 100
    assert third.content == again.content


async def test_the_first_client_breaks_off_before_a_whole_answer(stack: Stack) -> None:
    name = key()
    async with http(stack) as client:
        before = await counted(client, "first"), await counted(client, "joined")
        first = asyncio.create_task(client.post("/v1/completions", json=DRAWN, headers=name))

        async def running() -> bool:
            return await counted(client, "first") == before[0] + 1

        await wait_until(running, "the first to run")
        first.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await first
        again = await client.post("/v1/completions", json=DRAWN, headers=name)
        assert again.json()["usage"]["completion_tokens"] == DRAWN["max_tokens"]
        assert again.headers["idempotency-replayed"] == "true"
        assert await counted(client, "first") == before[0] + 1


async def test_a_forward_pass_is_answered_again(stack: Stack) -> None:
    hidden = np.random.default_rng(3).standard_normal((2, 256)).astype(np.float32)
    name, raw = key(), {"content-type": "application/octet-stream"}
    async with http(stack) as client:
        first, again, other_layer, bad, good = [
            await client.post(f"/v1/moe/forward?layer={layer}", content=body, headers={**raw, **headers})
            for layer, body, headers in (
                (0, hidden.tobytes(), name),
                (0, hidden.tobytes(), name),
                (1, hidden.tobytes(), name),
                (99, hidden.tobytes(), {"Idempotency-Key": "a-bad-layer-leaves-the-key-free"}),
                (1, hidden.tobytes(), {"Idempotency-Key": "a-bad-layer-leaves-the-key-free"}),
            )
        ]
        without = await client.post("/v1/moe/forward?layer=0", content=hidden.tobytes(), headers=raw)
    assert first.status_code == again.status_code == good.status_code == 200
    assert first.content == again.content == without.content
    assert again.headers["idempotency-replayed"] == "true"
    assert "idempotency-replayed" not in without.headers
    assert (other_layer.status_code, bad.status_code) == (422, 400)


# -- two gateways and a Redis -----------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def gateways(folder: Path, nats_url: str, redis: RealRedis) -> AsyncIterator[list[tuple[Running, str]]]:
    """Two gateways of the stack's deployment."""
    started: list[tuple[Running, str]] = []
    try:
        for _ in range(2):
            port = free_port()
            process = await start_service(
                folder, "gateway", NATS_URL=nats_url, REDIS_URL=redis.url, PORT=str(port), ENABLE_CACHING="false"
            )
            started.append((process, f"http://127.0.0.1:{port}"))
        for process, url in started:

            async def serves(url: str = url) -> bool:
                async with httpx.AsyncClient(base_url=url) as client:
                    try:
                        return (await client.get("/health")).status_code == 200
                    except httpx.TransportError:
                        return False

            await wait_until(serves, f"{process.name} to serve")
        yield started
    finally:
        for process, _ in started:
            if process.process.returncode is None:
                await process.stop()


@needs_redis
async def test_two_gateways_compute_once(stack: Stack, nats_url: str, redis: RealRedis, tmp_path: Path) -> None:
    name, body = key(), {**DRAWN, "stream": True}
    async with (
        gateways(tmp_path, nats_url, redis) as ((_, one_url), (_, two_url)),
        httpx.AsyncClient(base_url=one_url, timeout=60) as one,
        httpx.AsyncClient(base_url=two_url, timeout=60) as two,
    ):
        async with one.stream("POST", "/v1/completions", json=body, headers=name) as first:
            head = await anext(first.aiter_lines())
            waiting = asyncio.create_task(two.post("/v1/completions", json=body, headers=name))

            async def waits() -> bool:
                return await counted(two, "joined") == 1

            await wait_until(waits, "the second gateway to wait")
        # The first client has left; both gateways have the answer all the same.
        at_two, at_one = await waiting, await one.post("/v1/completions", json=body, headers=name)
        later = await two.post("/v1/completions", json=body, headers=name)
        assert at_two.content == at_one.content == later.content
        assert at_two.text.startswith(head)
        assert len(text_of(at_two.text)) > 50
        assert at_two.headers["idempotency-replayed"] == "true"
        assert (await counted(one, "first"), await counted(two, "first")) == (1, 0)
        refused = await two.post("/v1/completions", json={**body, "n": 2}, headers=name)
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "idempotency_mismatch")


@needs_redis
async def test_a_gateway_is_killed_and_the_retry_at_another_computes(
    stack: Stack, nats_url: str, redis: RealRedis, tmp_path: Path
) -> None:
    name, body = key(), {**DRAWN, "stream": True}
    async with (
        gateways(tmp_path, nats_url, redis) as ((process, one_url), (_, two_url)),
        httpx.AsyncClient(base_url=one_url, timeout=60) as one,
        httpx.AsyncClient(base_url=two_url, timeout=60) as two,
    ):
        async with one.stream("POST", "/v1/completions", json=body, headers=name) as first:
            lines = first.aiter_lines()
            await anext(lines)
            await process.kill()
            with pytest.raises(httpx.RemoteProtocolError):
                async for _ in lines:
                    pass
        again = await two.post("/v1/completions", json=body, headers=name)
        assert again.status_code == 200
        assert len(text_of(again.text)) > 50
        assert await counted(two, "first") == 1


@needs_redis
async def test_a_gateway_that_drains_ends_what_nobody_waits_for_any_more(
    stack: Stack, nats_url: str, redis: RealRedis, tmp_path: Path
) -> None:
    name, body = key(), {**DRAWN, "max_tokens": 400}
    async with (
        gateways(tmp_path, nats_url, redis) as ((process, one_url), (_, two_url)),
        httpx.AsyncClient(base_url=one_url, timeout=60) as one,
        httpx.AsyncClient(base_url=two_url, timeout=60) as two,
    ):
        first = asyncio.create_task(one.post("/v1/completions", json=body, headers=name))

        async def running() -> bool:
            return await counted(one, "first") == 1

        await wait_until(running, "the first to run")
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await process.stop()  # with exit code 0, once the answer is done and kept
        again = await two.post("/v1/completions", json=body, headers=name)
        assert again.headers["idempotency-replayed"] == "true"
        assert again.json()["usage"]["completion_tokens"] == 400
        assert await counted(two, "first") == 0
