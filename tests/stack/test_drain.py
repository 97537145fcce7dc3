"""SIGTERM while requests run, as a rolling update or a scale-down sends it: the work in flight is finished, exit code 0."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.running import Stack, Watcher, running_stack, wait_until
from tests.stack.looking import deployment_of, http, reports

READERS = 6
BODY: dict[str, Any] = {
    "prompt": "def read(",
    "max_tokens": 64,
    "ignore_eos": True,
    "temperature": 0,
    "stream": True,
    "stream_options": {"include_usage": True},
}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def spare(tmp_path_factory: pytest.TempPathFactory, nats_url: str) -> AsyncIterator[Stack]:
    """A stack in which every router and every shard has a second replica."""
    folder: Path = tmp_path_factory.mktemp("spare")
    arguments = ("--experts", "4", "--routers", "2", "--shards", "2")
    async with running_stack(folder, *arguments, NATS_URL=nats_url, SERVED_MODEL_NAME="spare", DTYPE="float32") as it:
        yield it


async def streamed(client: httpx.AsyncClient) -> tuple[str, int]:
    """The text and the number of tokens of one stream that must end well."""
    text, tokens, done = "", 0, False
    async with client.stream("POST", "/v1/completions", json=BODY) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            done = done or line == "data: [DONE]"
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                text += "".join(choice["text"] for choice in event["choices"])
                tokens = event["usage"]["completion_tokens"] if event.get("usage") else tokens
    assert done, "the stream ended without [DONE]"
    return text, tokens


def ended_well(stack: Stack, name: str, times: int) -> bool:
    """Whether the supervisor has seen that service end with exit code 0 `times` times."""
    said = stack.log.read_text(errors="replace").splitlines()
    return sum(line.startswith(name) and "ended with code 0" in line for line in said) >= times


@pytest.mark.parametrize("service", ["router", "expert"])
async def test_one_of_two_replicas_ends_and_no_stream_notices(spare: Stack, watcher: Watcher, service: str) -> None:
    deployment = await deployment_of(spare)
    await wait_until(lambda: len(reports(watcher.fleet, "router", deployment)) == 2, "both routers to be seen")
    async with http(spare) as client:
        undisturbed = await streamed(client)
        assert undisturbed[1] == BODY["max_tokens"]
        stop = asyncio.Event()
        seen: list[tuple[str, int]] = []

        async def read() -> None:
            while not stop.is_set():
                seen.append(await streamed(client))

        async with asyncio.TaskGroup() as group:
            for _ in range(READERS):
                group.create_task(read())
            for number, status in enumerate(reports(watcher.fleet, service, deployment)[:2]):
                replica = status.instance

                def others(replica: str = replica) -> bool:
                    live = {s.instance: s.state for s in reports(watcher.fleet, service, deployment)}
                    live.pop(replica, None)
                    return "ready" in live.values() and set(live.values()) == {"ready"}

                await wait_until(others, "its replicas to be ready")
                already = len(seen)
                await wait_until(lambda already=already: len(seen) > already, "requests to flow")  # type: ignore[misc]
                os.kill(status.pid, signal.SIGTERM)
                await wait_until(lambda n=number: ended_well(spare, service, n + 1), "it to end")  # type: ignore[misc]
                await wait_until(
                    lambda old=status.pid, name=replica: any(  # type: ignore[misc]
                        s.instance == name and s.pid != old and s.state == "ready"
                        for s in reports(watcher.fleet, service, deployment)
                    ),
                    "its successor to be ready",
                )
            stop.set()
    assert len(seen) >= READERS
    assert set(seen) == {undisturbed}


async def test_a_gateway_finishes_its_streams_and_takes_nothing_new(spare: Stack, watcher: Watcher) -> None:
    deployment = await deployment_of(spare)
    (status,) = reports(watcher.fleet, "gateway", deployment)
    async with http(spare) as client:
        undisturbed = await streamed(client)
        readers = [asyncio.create_task(streamed(client)) for _ in range(READERS)]

        async def running() -> bool:
            return int((await client.get("/load")).json()["running"]) == READERS

        await wait_until(running, "the streams to run")
        os.kill(status.pid, signal.SIGTERM)

        async def draining() -> bool:
            return (await client.get("/health")).status_code == 503

        await wait_until(draining, "readiness to be withdrawn")
        refused = await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert int(refused.headers["retry-after"]) >= 1
        assert set(await asyncio.gather(*readers)) == {undisturbed}
    await wait_until(lambda: ended_well(spare, "gateway", 1), "it to end")

    async def serves() -> bool:
        async with http(spare) as again:
            try:
                return (await again.get("/health")).status_code == 200
            except httpx.TransportError:
                return False

    await wait_until(serves, "its successor to serve")
