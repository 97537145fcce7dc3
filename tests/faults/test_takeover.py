"""The last replica of a shard dies, stops or leaves under load: another worker takes the shard over, and no text changes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import msgpack
import pytest
import pytest_asyncio
from nats.aio.msg import Msg

from shared import subjects
from tests.faults.unsupervised import Processes, Stream, processes, texts
from tests.running import Watcher, wait_until

pytestmark = pytest.mark.faults
PROMPTS = ["def read(", "class Stack:\n", "import os", "for line in "]
REASON = {signal.SIGKILL: "gone", signal.SIGSTOP: "stalled", signal.SIGTERM: "draining"}


@pytest_asyncio.fixture(loop_scope="session")
async def fleet(tmp_path: Path, nats_url: str, watcher: Watcher) -> AsyncIterator[Processes]:
    """Two workers with a shard each."""
    async with processes(tmp_path, nats_url, f"takeover-{tmp_path.name}") as made:
        await made.all_ready(watcher.fleet)
        yield made


@pytest.mark.parametrize("number", REASON)
async def test_a_shard_without_its_only_worker_is_taken_over_and_requests_go_on(
    fleet: Processes, watcher: Watcher, number: signal.Signals
) -> None:
    undisturbed = await texts(fleet.url, PROMPTS)
    victim, heir = fleet.only_holder(watcher.fleet, 1), fleet.only_holder(watcher.fleet, 0)
    process = fleet.running[victim].process
    told: list[dict[str, object]] = []

    def on_event(message: Msg) -> None:
        event = msgpack.unpackb(message.data)
        if event["subject"] == f"{fleet.deployment}/1":
            told.append(event)

    await watcher.bus.watch(subjects.event("takeover"), on_event)
    await watcher.bus.flush()
    streams = [Stream(fleet.url, prompt) for prompt in PROMPTS]
    readers = [asyncio.create_task(stream.read()) for stream in streams]
    try:
        await wait_until(lambda: all(stream.pieces > 5 for stream in streams), "all streams to run")
        os.kill(process.pid, number)
        assert not any(reader.done() for reader in readers), "the fault came too late to disturb anybody"
        await wait_until(
            lambda: any(s.instance == heir and s.shards == (0, 1) for s in fleet.ready(watcher.fleet, "expert")),
            f"the shard to be taken over; {fleet.running[heir].said()}",
        )
        assert await asyncio.gather(*readers) == undisturbed
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        os.kill(process.pid, signal.SIGCONT) if number == signal.SIGSTOP else None
    (begun,) = fleet.said(heir, "expert.takeover")
    assert (begun["shard"], begun["lost"], begun["reason"]) == (1, victim, REASON[number])
    assert begun["seconds_since_last_sign"] >= 0
    assert fleet.said(heir, "expert.taken_over")[0]["load_seconds"] > 0
    await wait_until(lambda: told, "the event", 10)
    assert told[0]["kind"] == "takeover"
    assert victim in str(told[0]["text"])
    (address,) = [s.address for s in fleet.ready(watcher.fleet, "expert") if s.instance == heir]
    async with httpx.AsyncClient(trust_env=False) as client:
        metrics = (await client.get(f"http://{address}/metrics")).text
    assert f'moe_takeover_seconds_count{{reason="{REASON[number]}"}} 1.0' in metrics
    if number == signal.SIGTERM:
        await fleet.running[victim].stop()
        assert not fleet.said(victim, "expert.not_handed_over")
    if number == signal.SIGSTOP:
        await wait_until(
            lambda: len([s for s in fleet.ready(watcher.fleet, "expert") if 1 in s.shards]) == 2, "both to serve"
        )
    assert await texts(fleet.url, PROMPTS) == undisturbed


async def test_a_worker_that_is_started_again_serves_beside_its_successor(fleet: Processes, watcher: Watcher) -> None:
    victim, heir = fleet.only_holder(watcher.fleet, 1), fleet.only_holder(watcher.fleet, 0)
    undisturbed = await texts(fleet.url, PROMPTS[:1])
    await fleet.running[victim].kill()
    await wait_until(
        lambda: any(s.instance == heir and s.shards == (0, 1) for s in fleet.ready(watcher.fleet, "expert")),
        "the shard to be taken over",
    )
    fleet.running.pop(victim)
    assert await fleet.start("expert", int(victim[-1])) == victim
    await wait_until(lambda: len(fleet.ready(watcher.fleet, "expert")) == 2, "it to serve again")
    assert await texts(fleet.url, PROMPTS[:1]) == undisturbed
    assert len(fleet.said(heir, "expert.takeover")) == 1
