"""Clients that do not read their streams hold up nobody, and do not keep their places for ever."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest
import pytest_asyncio

from shared.settings import MIB
from tests.faults.raw_http import LazyReader, ask, lazy_reader, metric
from tests.running import Stack, Watcher, running_stack, wait_until
from tests.stack.looking import deployment_of, http, idle, reports

pytestmark = pytest.mark.faults

PATIENCE_SECONDS = 4
PATH = "/v1/chat/completions"
SMALL: dict[str, Any] = {"max_tokens": 40, "temperature": 0, "ignore_eos": True, "stream": True}
# An answer that no socket holds: eight choices, and twenty alternatives of each token.
LARGE: dict[str, Any] = {
    "messages": [{"role": "user", "content": "sort a list"}],
    "n": 8,
    "max_tokens": 900,
    "temperature": 0,
    "ignore_eos": True,
    "stream": True,
    "logprobs": True,
    "top_logprobs": 20,
}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def patient(tmp_path_factory: pytest.TempPathFactory, nats_url: str) -> AsyncIterator[Stack]:
    """A stack that waits little for its readers, with room for three large answers and the small ones."""
    limits = {
        "TIMEOUT_SECONDS": str(PATIENCE_SECONDS),
        "MAX_CONCURRENT_REQUESTS": "32",
        "BATCH_SIZE": "32",
        "LOG_LEVEL": "WARNING",
    }
    async with running_stack(tmp_path_factory.mktemp("patient"), NATS_URL=nats_url, **limits) as stack:
        yield stack


def texts(stream: bytes) -> dict[int, str]:
    """What a stream says, choice by choice; it must have come to its end."""
    *events, last = [event.removeprefix("data: ") for event in stream.decode().split("\n\n") if event]
    assert last == "[DONE]"
    said: dict[int, str] = {}
    for event in events:
        for choice in json.loads(event)["choices"]:
            text = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            said[choice["index"]] = said.get(choice["index"], "") + text
    return said


async def small_streams(stack: Stack) -> list[dict[int, str]]:
    bodies = [{**SMALL, "prompt": f"def function_{number}("} for number in range(8)]
    answers = await asyncio.gather(*(ask(stack.url, "/v1/completions", body) for body in bodies))
    assert {answer.status for answer in answers} == {200}
    return [texts(answer.body) for answer in answers]


async def begun(reader: LazyReader) -> None:
    assert await reader.read(1024)
    assert reader.read_so_far.startswith(b"HTTP/1.1 200 ")


async def test_readers_that_stop_hold_up_nobody_and_are_cut(patient: Stack, watcher: Watcher) -> None:
    deployment = await deployment_of(patient)
    undisturbed = await small_streams(patient)
    (gateway,) = reports(watcher.fleet, "gateway", deployment)
    process = psutil.Process(gateway.pid)
    async with http(patient) as client:
        before = await metric(client, "moe_slow_readers_cut_total")
        memory = process.memory_info().rss
        async with (
            lazy_reader(patient.url, PATH, LARGE) as one,
            lazy_reader(patient.url, PATH, LARGE) as two,
            lazy_reader(patient.url, PATH, LARGE) as three,
        ):
            for reader in (one, two, three):
                await begun(reader)
            while await metric(client, "moe_slow_readers_cut_total") < before + 3:
                assert await small_streams(patient) == undisturbed
            await wait_until(lambda: idle(watcher.fleet, deployment), "their places and KV blocks to be free")
            assert process.memory_info().rss < memory + 128 * MIB
        assert (await client.get("/load")).json() == {"running": 0, "waiting": 0}
    assert await small_streams(patient) == undisturbed


async def test_a_reader_that_is_slow_but_reads_gets_all_of_it(patient: Stack, watcher: Watcher) -> None:
    deployment = await deployment_of(patient)
    body = {**LARGE, "max_tokens": 450}
    expected = texts((await ask(patient.url, PATH, body)).body)
    assert len(expected) == 8
    async with http(patient) as client:
        before = await metric(client, "moe_slow_readers_cut_total")
        async with lazy_reader(patient.url, PATH, body) as reader:
            await begun(reader)
            # In all for longer than anybody is waited for, but never so long without a sign.
            for _ in range(8 * PATIENCE_SECONDS):
                await reader.read(1 << 16)
                await asyncio.sleep(0.25)
            answer = await reader.rest()
        assert texts(answer.body) == expected
        assert await metric(client, "moe_slow_readers_cut_total") == before
    await wait_until(lambda: idle(watcher.fleet, deployment), "nothing to run")
