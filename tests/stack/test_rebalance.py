"""A skewed model is rebalanced online: the shards' loads become even, and no request fails or is answered otherwise."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from nats.aio.msg import Msg

from services.monitor.messages import Event
from shared import subjects, wire
from shared.status import Status
from tests.running import Watcher, running_nats, running_stack, wait_until, watching
from tests.skewed import SHARDS, make_skewed
from tests.stack.looking import http

STREAMS = 6
REBALANCED_SECONDS = 120


def request(number: int) -> dict[str, Any]:
    prompt = [2 + (number * 37 + n * 11 + n * n * number) % 150 for n in range(6 + number * 7 % 20)]
    return {"prompt": prompt, "max_tokens": 32, "seed": number, "ignore_eos": True}


async def text(client: httpx.AsyncClient, number: int) -> str:
    answer = await client.post("/v1/completions", json=request(number))
    assert answer.status_code == 200, answer.text
    assert "degraded" not in answer.json()
    return str(answer.json()["choices"][0]["text"])


@dataclass
class Told:
    """What the monitor said about plans."""

    events: list[Event] = field(default_factory=list)

    def on_message(self, message: Msg) -> None:
        self.events.append(wire.decode(Event, message.data))

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]


def shard_tokens(watcher: Watcher) -> list[int]:
    """Pairs that the routers have sent to each shard, all layers together."""
    rows = [row for s in watcher.fleet.live("router") for row in s.shard_tokens]
    return [sum(column) for column in zip(*rows, strict=True)] or [0] * SHARDS


def unevenness(before: list[int], after: list[int]) -> float:
    """The most loaded shard over the mean, between two looks."""
    grown = [now - then for then, now in zip(before, after, strict=True)]
    return max(grown) * len(grown) / sum(grown)


def workers(watcher: Watcher) -> list[Status]:
    return watcher.fleet.live("expert")


async def test_a_skewed_model_is_rebalanced_under_running_streams(tmp_path: Path) -> None:
    model = make_skewed(tmp_path / "m")
    settings = {
        "REBALANCE_MIN_TOKENS": "1500",
        "REBALANCE_HALF_LIFE_SECONDS": "30",
        "LOG_LEVEL": "INFO",
    }
    async with (
        running_nats(tmp_path) as nats_url,
        watching(nats_url) as watcher,
        running_stack(tmp_path, "--model", str(model), "--shards", str(SHARDS), NATS_URL=nats_url, **settings) as stack,
        http(stack) as client,
    ):
        told = Told()
        await watcher.bus.watch(subjects.event("rebalance"), told.on_message)
        undisturbed = [await text(client, number) for number in range(STREAMS)]
        assert not told.events, "there were too few tokens for a plan"
        await wait_until(lambda: sum(shard_tokens(watcher)) > 0, "the router to report its tokens")
        skewed = shard_tokens(watcher)
        assert unevenness([0] * SHARDS, skewed) > 2

        rounds: list[list[str]] = []
        over = asyncio.Event()

        async def load() -> None:
            while not over.is_set():
                rounds.append(await asyncio.gather(*(text(client, number) for number in range(STREAMS))))

        loading = asyncio.create_task(load(), name="load")
        try:
            await wait_until(
                lambda: loading.done() or told.of("rebalance_planned"), "the monitor to make a plan", REBALANCED_SECONDS
            )
            await wait_until(
                lambda: loading.done() or told.of("rebalance_measured"),
                "the monitor to measure what came of it",
                REBALANCED_SECONDS,
            )
            before, answered = shard_tokens(watcher), len(rounds)
            await wait_until(
                lambda: loading.done() or (len(rounds) > answered + 3 and shard_tokens(watcher) != before),
                "more rounds after the plan",
            )
            even = unevenness(before, shard_tokens(watcher))
        finally:
            over.set()
            await loading
        assert all(each == undisturbed for each in rounds), "an answer changed"
        assert even < 1.2
        (measured,) = told.of("rebalance_measured")
        figures = re.findall(r"\d+\.\d\d", measured.text)
        assert float(figures[0]) > 2
        assert float(figures[1]) < 1.2
        (plan,) = told.of("rebalance_planned")
        assert "expert 0 of MoE layer" in plan.text
        assert {s.epoch for s in (*workers(watcher), *watcher.fleet.live("router"))} == {1}
        assert await text(client, 0) == undisturbed[0]
