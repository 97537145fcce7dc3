"""A shard that nobody serves: DEGRADED_MODE=fail says which one, skip answers without it, and every answer says so."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from services.nats_server import free_port
from shared.checkpoint import Checkpoint
from shared.settings import DEMO_MODEL
from tests.running import running_nats, start_service, wait_until, watching

HIDDEN = Checkpoint.open(DEMO_MODEL).config.hidden_size
COMPLETION = {"prompt": "def f(x):", "max_tokens": 4, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
FORWARD = {"layer": 0, "hidden_states": [[1.0] * HIDDEN, [-1.0] * HIDDEN]}


@contextlib.asynccontextmanager
async def half_a_model(folder: Path, degraded_mode: str) -> AsyncIterator[httpx.AsyncClient]:
    """A gateway before a router that has the first of its two shards only."""
    async with running_nats(folder) as nats_url, watching(nats_url) as watcher:
        port = free_port()
        common = {"NATS_URL": nats_url, "EXPERT_SHARDS": "2"}
        services = [
            await start_service(folder, "expert", **common, SHARDS="0"),
            await start_service(folder, "router", **common, DEGRADED_MODE=degraded_mode, EXPERT_RECOVERY_SECONDS="0.2"),
            await start_service(folder, "gateway", **common, PORT=str(port)),
        ]
        try:
            await wait_until(
                lambda: (
                    {s.service for s in watcher.fleet.live() if s.state == "ready"} == {"expert", "router", "gateway"}
                ),
                "the services to be ready",
            )
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
                yield client
        finally:
            for service in reversed(services):
                await service.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def skipping(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[httpx.AsyncClient]:
    async with half_a_model(tmp_path_factory.mktemp("skip"), "skip") as client:
        yield client


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", COMPLETION),
        ("/v1/chat/completions", CHAT),
        ("/v1/moe/forward", FORWARD),
        ("/v1/moe/route", {"prompt": "def f(x):"}),
    ],
)
async def test_an_answer_without_some_experts_says_so(
    skipping: httpx.AsyncClient, path: str, body: dict[str, object]
) -> None:
    answer = await skipping.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["degraded"] is True
    assert answer.headers["x-moe-degraded"] == "true"


async def test_every_event_of_a_stream_says_so(skipping: httpx.AsyncClient) -> None:
    async with skipping.stream("POST", "/v1/completions", json={**COMPLETION, "stream": True}) as answer:
        assert answer.headers["x-moe-degraded"] == "true"
        lines = [line.removeprefix("data: ") async for line in answer.aiter_lines() if line]
    assert lines.pop() == "[DONE]"
    assert len(lines) == 4
    assert all(json.loads(line)["degraded"] is True for line in lines)


async def test_by_default_it_fails_and_names_the_shard(tmp_path: Path) -> None:
    async with half_a_model(tmp_path, "fail") as client:
        answer = await client.post("/v1/completions", json=COMPLETION)
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert answer.json()["error"]["code"] == "shard_unavailable"
        assert "expert shard 1" in answer.json()["error"]["message"]
