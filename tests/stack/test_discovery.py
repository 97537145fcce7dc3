"""Any NATS client finds the fleet: the services and their supervisor answer discovery as NATS' ADR-32 asks."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import nats
import pytest_asyncio

from tests.running import Stack, Watcher, wait_until

SERVICES = {f"openmoe-{name}" for name in ("gateway", "router", "expert", "monitor", "supervisor")}
SEMANTIC_VERSION = re.compile(r"\d+\.\d+\.\d+$")
NAME = re.compile(r"[A-Za-z0-9_-]+$")


@pytest_asyncio.fixture(loop_scope="session")
async def plain(stack: Stack, nats_url: str) -> AsyncIterator[Any]:
    """A client that knows nothing of ours."""
    client = await nats.connect(nats_url)
    yield client
    await client.close()


async def ask(client: Any, subject: str, expected: Callable[[], set[str]]) -> list[dict[str, Any]]:
    """The answers to `subject`, once all of `expected` have answered; a round trip later nobody else may have."""
    answers: list[dict[str, Any]] = []

    async def on_answer(message: Any) -> None:
        answers.append(json.loads(message.data))

    inbox = client.new_inbox()
    subscription = await client.subscribe(inbox, cb=on_answer)
    await client.publish(subject, b"", reply=inbox)
    await wait_until(lambda: {answer["id"] for answer in answers} == expected(), f"all to answer {subject}")
    await client.flush()
    await subscription.unsubscribe()
    assert len(answers) == len(expected())
    return answers


def alive(watcher: Watcher, service: str | None = None) -> set[str]:
    return {status.instance for status in watcher.fleet.live(service)}


async def all_reported(watcher: Watcher) -> None:
    def complete() -> bool:
        found = [status.service for status in watcher.fleet.live()]
        return sorted(found) == ["expert", "expert", "gateway", "monitor", "router"]

    await wait_until(complete, "the reports of the stack's services, and of nobody else")


async def test_all_services_answer_ping_info_and_stats(plain: Any, watcher: Watcher) -> None:
    await all_reported(watcher)
    supervisor = json.loads((await plain.request("$SRV.PING.openmoe-supervisor", b"", timeout=30)).data)["id"]
    for verb in ("PING", "INFO", "STATS"):
        answers = await ask(plain, f"$SRV.{verb}", lambda: {supervisor, *alive(watcher)})
        assert {answer["name"] for answer in answers} == SERVICES
        for answer in answers:
            assert answer["type"] == f"io.nats.micro.v1.{verb.lower()}_response"
            assert SEMANTIC_VERSION.match(answer["version"])
            assert isinstance(answer["metadata"], dict)


async def test_info_names_the_endpoints_that_stats_counts(plain: Any, stack: Stack, watcher: Watcher) -> None:
    await all_reported(watcher)
    async with httpx.AsyncClient(base_url=stack.url, timeout=60) as http:
        answer = await http.post("/v1/completions", json={"prompt": "import", "max_tokens": 2})
        assert answer.status_code == 200
    (info,) = await ask(plain, "$SRV.INFO.openmoe-router", lambda: alive(watcher, "router"))
    assert info["description"]
    served = {endpoint["subject"].split(".")[-1] for endpoint in info["endpoints"]}
    assert {"generate", "forward"} <= served
    for service in ("router", "expert"):
        for stats in await ask(plain, f"$SRV.STATS.openmoe-{service}", lambda s=service: alive(watcher, s)):  # type: ignore[misc]
            assert stats["started"].endswith("Z")
            assert sum(endpoint["num_requests"] for endpoint in stats["endpoints"]) > 0
            for endpoint in stats["endpoints"]:
                assert NAME.match(endpoint["name"])
                assert endpoint["num_errors"] >= 0
                assert endpoint["processing_time"] >= endpoint["average_processing_time"] >= 0


async def test_one_service_and_one_instance_can_be_asked(plain: Any, watcher: Watcher) -> None:
    await all_reported(watcher)
    for instance in alive(watcher, "expert"):
        await ask(plain, f"$SRV.PING.openmoe-expert.{instance}", lambda i=instance: {i})  # type: ignore[misc]
    await ask(plain, "$SRV.PING.openmoe-expert", lambda: alive(watcher, "expert"))
