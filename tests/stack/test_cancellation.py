"""A client that goes away frees its place and its KV blocks at once, and the next request works."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import httpx

from tests.running import Stack, Watcher, wait_until
from tests.stack.looking import deployment_of, http, idle, reports

LONG: dict[str, Any] = {"prompt": "def read(", "max_tokens": 1000, "ignore_eos": True, "temperature": 0}


async def all_free(stack: Stack, watcher: Watcher, deployment: str) -> None:
    """Wait until nothing runs, and check that the next request works."""
    await wait_until(lambda: idle(watcher.fleet, deployment), "the place and the KV blocks to be free")
    async with http(stack) as client:
        assert (await client.get("/load")).json() == {"running": 0, "waiting": 0}
        answer = await client.post("/v1/completions", json={"prompt": "import", "max_tokens": 3, "ignore_eos": True})
    assert answer.json()["usage"]["completion_tokens"] == 3


def busy(watcher: Watcher, deployment: str) -> bool:
    return any(status.running and status.kv_usage for status in reports(watcher.fleet, "router", deployment))


def tokens(watcher: Watcher, deployment: str) -> int:
    return sum(status.tokens_total for status in reports(watcher.fleet, "router", deployment))


async def test_a_reader_that_leaves_mid_stream(stack: Stack, watcher: Watcher) -> None:
    deployment = await deployment_of(stack)
    await wait_until(lambda: idle(watcher.fleet, deployment), "the stack to be idle")
    before = tokens(watcher, deployment)
    async with http(stack) as client:
        for path, more in (
            ("/v1/completions", {}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "sort"}], "max_tokens": 900}),
        ):
            async with client.stream("POST", path, json={**LONG, "stream": True, **more}) as answer:
                assert answer.status_code == 200
                lines = answer.aiter_lines()
                for _ in range(4):
                    await anext(lines)
    await all_free(stack, watcher, deployment)
    assert tokens(watcher, deployment) - before < 900, "the generations went on to their ends"


async def test_a_reader_that_leaves_before_a_whole_answer(stack: Stack, watcher: Watcher) -> None:
    deployment = await deployment_of(stack)
    await wait_until(lambda: idle(watcher.fleet, deployment), "the stack to be idle")
    before = tokens(watcher, deployment)
    async with http(stack) as client:
        asked = [asyncio.create_task(client.post("/v1/completions", json={**LONG, "n": 2})) for _ in range(3)]
        await wait_until(lambda: busy(watcher, deployment), "the generations to run")
        for task in asked:
            task.cancel()
        for task in asked:
            with contextlib.suppress(asyncio.CancelledError):
                await task
    await all_free(stack, watcher, deployment)
    assert tokens(watcher, deployment) - before < 6000, "the generations went on to their ends"


async def test_readers_that_leave_at_once(stack: Stack, watcher: Watcher) -> None:
    deployment = await deployment_of(stack)
    for number in range(10):
        timeout = httpx.Timeout(30, read=0.002 * number + 1e-6)
        async with httpx.AsyncClient(base_url=stack.url, timeout=timeout) as client:
            with contextlib.suppress(httpx.ReadTimeout):
                await client.post("/v1/completions", json={**LONG, "stream": bool(number % 2)})
    await all_free(stack, watcher, deployment)
