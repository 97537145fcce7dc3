"""Two hundred requests at once: all are answered exactly, and nothing of them is left."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from shared.settings import MIB
from shared.status import Status
from tests.oracle import VOCAB, make_checkpoint
from tests.running import Stack, Watcher, running_stack, wait_until
from tests.stack.looking import deployment_of, http, idle, open_files, reports, threads

REQUESTS = 200
KV_CACHE_MB = 1
PROCESS_MB = 700
"""Python, torch's libraries and its work space, before any weight."""


@dataclass(frozen=True)
class Crowded:
    """A stack that has far fewer places and KV blocks than requests."""

    stack: Stack
    path: Path
    deployment: str


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def crowded(tmp_path_factory: pytest.TempPathFactory, nats_url: str) -> AsyncIterator[Crowded]:
    folder = tmp_path_factory.mktemp("crowded")
    path = make_checkpoint(folder / "crowded", "mixtral")
    async with running_stack(
        folder,
        "--model",
        str(path),
        NATS_URL=nats_url,
        MAX_CONCURRENT_REQUESTS="64",
        KV_CACHE_MB=str(KV_CACHE_MB),
        TIMEOUT_SECONDS="120",
        MAX_QUEUE_SECONDS="120",
        LOG_LEVEL="WARNING",
    ) as stack:
        yield Crowded(stack, path, await deployment_of(stack))


async def complete(client: httpx.AsyncClient, number: int) -> None:
    """One request of a size of its own, every third streamed; its usage must be exact."""
    chance = random.Random(number)
    prompt = [chance.randrange(2, VOCAB) for _ in range(chance.randint(1, 200))]
    body = {"prompt": prompt, "max_tokens": chance.randint(1, 40), "ignore_eos": True, "seed": number}
    if number % 3:
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        said = answer.json()
        assert said["choices"][0]["finish_reason"] == "length"
    else:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        answer = await client.post("/v1/completions", json={**body, **options})
        assert answer.status_code == 200, answer.text
        *events, last = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        assert last == "[DONE]"
        *_, said = [json.loads(event) for event in events]
    assert said["usage"]["prompt_tokens"] == len(prompt)
    assert said["usage"]["completion_tokens"] == body["max_tokens"]


def processes(watcher: Watcher, deployment: str) -> list[Status]:
    return [s for service in ("gateway", "router", "expert") for s in reports(watcher.fleet, service, deployment)]


async def test_two_hundred_requests_at_once_are_all_answered(crowded: Crowded, watcher: Watcher) -> None:
    stack, deployment = crowded.stack, crowded.deployment
    await wait_until(lambda: idle(watcher.fleet, deployment), "the stack's reports")
    for round_number in range(2):
        async with http(stack) as client:
            await asyncio.gather(*(complete(client, round_number * REQUESTS + n) for n in range(REQUESTS)))
            assert (await client.get("/load")).json() == {"running": 0, "waiting": 0}
            await wait_until(lambda: idle(watcher.fleet, deployment), "nothing to run and no KV block to be held")
            report = (await client.get("/performance-report")).json()
        assert report["kv_cache_usage"] == 0
        assert report["totals"]["failed"] == 0
        if round_number == 0:
            first = {s.instance: (open_files(s), threads(s)) for s in processes(watcher, deployment)}
    for status in processes(watcher, deployment):
        files, thread_count = first[status.instance]
        await wait_until(lambda s=status, n=files: open_files(s) <= n, f"{status.instance} to close its connections")  # type: ignore[misc]
        assert threads(status) <= thread_count, status.instance


async def test_memory_stays_within_its_budget(crowded: Crowded, watcher: Watcher) -> None:
    weights = sum(file.stat().st_size for file in crowded.path.glob("*.safetensors"))
    budget = weights + (KV_CACHE_MB + PROCESS_MB) * MIB
    async with http(crowded.stack) as client:
        await asyncio.gather(*(complete(client, n) for n in range(64)))
    await wait_until(lambda: idle(watcher.fleet, crowded.deployment), "nothing to run")
    for status in processes(watcher, crowded.deployment):
        assert status.memory_bytes > 0
        assert status.memory_bytes < budget, f"{status.instance}: {status.memory_bytes / MIB:.0f} MB"


async def together(url: str, body: dict[str, Any], count: int) -> list[httpx.Response]:
    """The answers to `count` requests that arrive in one moment, over connections that are open already."""
    host, port = url.removeprefix("http://").split(":")
    connections = [await asyncio.open_connection(host, int(port)) for _ in range(count)]
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    for _, writer in connections:
        writer.write(head.encode() + data)
    answers = []
    for reader, writer in connections:
        raw = await reader.read()
        writer.close()
        await writer.wait_closed()
        first, *lines = raw.partition(b"\r\n\r\n")[0].decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        headers.pop("transfer-encoding", None)
        answers.append(httpx.Response(int(first.split()[1]), headers=headers, content=raw.partition(b"\r\n\r\n")[2]))
    return answers


async def test_a_full_line_says_so_at_once(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "m", "mixtral")
    limits = {"MAX_CONCURRENT_REQUESTS": "1", "MAX_QUEUED_REQUESTS": "2", "LOG_LEVEL": "WARNING"}
    body = {"prompt": [5] * 8, "max_tokens": 200, "ignore_eos": True}
    async with running_stack(tmp_path, "--model", str(path), "--experts", "1", **limits) as stack:
        answers = await together(stack.url, body, 12)
        served = [answer for answer in answers if answer.status_code == 200]
        assert len(served) == 3, "one runs and two wait; the others must be refused"
        for answer in answers:
            if answer not in served:
                assert answer.status_code == 429
                assert answer.json()["error"]["code"] == "overloaded"
                assert int(answer.headers["retry-after"]) > 0
        async with http(stack) as client:
            assert (await client.post("/v1/completions", json={**body, "max_tokens": 1})).status_code == 200
