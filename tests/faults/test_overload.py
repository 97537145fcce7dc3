"""Five times the load that can be served: those who are let in are served in time, the others hear so at once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest
import pytest_asyncio

from shared.settings import MIB
from tests.faults.raw_http import Answer, ask, metric
from tests.running import Stack, Watcher, running_stack, wait_until
from tests.stack.looking import deployment_of, http, idle, reports

pytestmark = pytest.mark.faults

PLACES = 4
MAX_QUEUE_SECONDS = 1
SLACK_SECONDS = 10
"""A bucket of the histogram: an estimate may be wrong by this on a machine that has much else to do."""
SECONDS = 8
BODY: dict[str, Any] = {"prompt": "def read_file(path):", "max_tokens": 48, "temperature": 0, "ignore_eos": True}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def small(tmp_path_factory: pytest.TempPathFactory, nats_url: str) -> AsyncIterator[Stack]:
    limits = {
        "MAX_CONCURRENT_REQUESTS": str(PLACES),
        "BATCH_SIZE": str(PLACES),
        "MAX_QUEUE_SECONDS": str(MAX_QUEUE_SECONDS),
        "LOG_LEVEL": "WARNING",
    }
    async with running_stack(tmp_path_factory.mktemp("small"), NATS_URL=nats_url, **limits) as stack:
        yield stack


async def capacity(stack: Stack) -> float:
    """Requests per second of as many clients as there are places."""
    loop = asyncio.get_running_loop()
    start, served = loop.time(), 0

    async def client() -> None:
        nonlocal served
        while loop.time() < start + 2:
            assert (await ask(stack.url, "/v1/completions", BODY)).status == 200
            served += 1

    await asyncio.gather(*(client() for _ in range(PLACES)))
    return served / (loop.time() - start)


async def arrivals(stack: Stack, rate: float, seconds: float) -> list[Answer]:
    """The answers to requests that come at random, whatever became of those before."""
    loop, draw = asyncio.get_running_loop(), random.Random(5)
    due = start = loop.time()
    asked: list[asyncio.Task[Answer]] = []
    while (due := due + draw.expovariate(rate)) < start + seconds:
        await asyncio.sleep(max(0.0, due - loop.time()))
        asked.append(asyncio.create_task(ask(stack.url, "/v1/completions", BODY), name="arrival"))
    return list(await asyncio.gather(*asked))


async def test_five_times_the_capacity(small: Stack, watcher: Watcher) -> None:
    deployment = await deployment_of(small)
    undisturbed = (await ask(small.url, "/v1/completions", BODY)).body
    rate = await capacity(small)
    (gateway,) = reports(watcher.fleet, "gateway", deployment)
    process = psutil.Process(gateway.pid)
    async with http(small) as client:
        await arrivals(small, 5 * rate, 1)  # what grows once, by the first crowd, is no growth
        memory = process.memory_info().rss
        admitted = await metric(client, "moe_admission_queue_time_seconds_count")
        answers = await arrivals(small, 5 * rate, SECONDS)
        served = [answer for answer in answers if answer.status == 200]
        refused = [answer for answer in answers if answer.status != 200]

        assert len(served) > rate * SECONDS / 4, "the service went on at about its capacity"
        assert len(refused) > len(answers) / 4, "what it cannot do it refuses"
        assert {answer.body[answer.body.index(b'"choices"') :] for answer in served} == {
            undisturbed[undisturbed.index(b'"choices"') :]
        }
        for answer in refused:
            # Not queue_timeout: nobody is refused who has waited.
            assert (answer.status, answer.code) == (429, "overloaded")
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert await metric(client, "moe_admission_queue_time_seconds_count") == admitted + len(served)
        bucket = f'moe_admission_queue_time_seconds_bucket{{le="{float(SLACK_SECONDS)}"}}'
        text = (await client.get("/metrics")).text
        in_time = next(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(bucket))
        assert in_time == admitted + len(served), "somebody was in line for long"
        assert process.memory_info().rss < memory + 64 * MIB

        await wait_until(lambda: idle(watcher.fleet, deployment), "nothing to run or to wait")
        assert (await client.get("/load")).json() == {"running": 0, "waiting": 0}
    after = await ask(small.url, "/v1/completions", BODY)
    assert after.status == 200
    for answer in await asyncio.gather(*(ask(small.url, "/v1/completions", BODY) for _ in range(PLACES))):
        assert answer.status == 200, "with as many as there are places nobody is refused"


async def test_bodies_in_memory_are_bounded_together(tmp_path_factory: pytest.TempPathFactory, nats_url: str) -> None:
    limits = {"MAX_BODY_MB": "1", "MAX_CONCURRENT_REQUESTS": "1", "MAX_QUEUE_SECONDS": "600", "LOG_LEVEL": "WARNING"}
    body = {**BODY, "user": "x" * 900_000}
    async with (
        running_stack(tmp_path_factory.mktemp("bodies"), NATS_URL=nats_url, **limits) as stack,
        http(stack) as client,
    ):
        answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(24)))
        served = [answer for answer in answers if answer.status_code == 200]
        assert len(served) >= 8, "eight of the largest size are held"
        assert len(served) < 20
        for answer in answers:
            if answer not in served:
                assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")
                assert int(answer.headers["retry-after"]) >= 1
        assert (await client.post("/v1/completions", json=body)).status_code == 200
