"""What copies of hot experts bring to a skewed model: `python -m bench.balance [--seconds 10]`.

The checkpoint is random and tiny (bench/checkpoints.py), but its gates send most tokens to two experts of shard 0 of 4.
4 workers, one for each shard, *sleep* 0.5 ms for each token and expert in place of computing (SIMULATED_PAIR_MS), so
that they have a machine each, however few cores there are; router, bus, gateway and monitor are real. 16 streams decode
all the while. Measured are `--seconds` before the monitor has seen enough tokens for a plan, and as many after it says
that the plan is followed. Printed is one JSON object:

- `tokens_per_second`: generated, before and after;
- `imbalance`: the most loaded shard over the mean, by what the router sent to each in these seconds;
- `switch_seconds`: from the plan's event until all report that they go by it;
- `slowest_second`: the least tokens/s between two reports of the router meanwhile and in the 3 s after;
- `failed`: requests, all along.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvloop
from nats.aio.msg import Msg
from transformers import AutoModelForCausalLM

from bench.checkpoints import write
from bench.dispatch import process, until
from bench.stack import stack
from services.benchmark_http import Client
from services.monitor.balance import imbalance
from services.monitor.messages import Event
from services.nats_server import answers_as, binary, free_port, write_config
from shared import subjects, wire
from shared.bus import Bus
from shared.status import Fleet, Status

SHARDS, STREAMS, MAX_TOKENS, PROMPT_TOKENS = 4, 16, 128, 4
SIMULATED_PAIR_MS = "0.5"
MIN_TOKENS = "8000"
HOT = {0: 1.0, 4: 0.1}
"""Experts of shard 0, and how much the gates like them."""
WARM_UP_TOKENS = 500
PLAN_SECONDS = 180.0
NAME = "bench-balance"


def skew(folder: Path) -> None:
    """Give all embeddings the same large number in one place, and let the hot experts' rows of the gates look at it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        embeddings = model.model.embed_tokens.weight
        embeddings[:, 0] = 3 * embeddings.float().std()
        for layer in model.model.layers:
            for expert, strength in HOT.items():
                layer.mlp.gate.weight[expert, 0] = strength
    model.save_pretrained(folder)


@dataclass
class Seen:
    """What was heard on the bus, and what the streams met."""

    events: list[Event] = field(default_factory=list)
    failed: int = 0
    reports: list[tuple[float, Status]] = field(default_factory=list)
    """The router's, and when they came."""

    def __post_init__(self) -> None:
        self.fleet = Fleet(tell=self.on_status)

    def on_status(self, status: Status, now: float) -> None:
        if status.service == "router":
            self.reports.append((now, status))

    def on_event(self, message: Msg) -> None:
        self.events.append(wire.decode(Event, message.data))

    def of(self, kind: str) -> Event | None:
        return next((event for event in self.events if event.kind == kind), None)

    def followed(self) -> bool:
        """Whether all go by the first plan."""
        return {s.epoch for service in ("router", "expert") for s in self.fleet.live(service)} == {1}

    def tokens(self) -> int:
        return self.reports[-1][1].tokens_total if self.reports else 0


async def stream(client: Client, seen: Seen, number: int) -> None:
    """One completion after another."""
    draw = random.Random(number)
    while True:
        prompt = [draw.randrange(3, 4000) for _ in range(PROMPT_TOKENS)]
        body = {"prompt": prompt, "max_tokens": MAX_TOKENS, "ignore_eos": True, "seed": draw.randrange(2**31)}
        status, _ = await client.ask("POST", "/v1/completions", json.dumps(body).encode(), lambda _: None)
        seen.failed += status != 200


async def window(seen: Seen, seconds: float) -> tuple[float, float]:
    """Tokens per second, and the imbalance, of the next `seconds`."""

    async def look() -> tuple[float, Status]:
        """The next report."""
        known = len(seen.reports)
        await _until(lambda: len(seen.reports) > known, "a report of the router")
        return seen.reports[known]

    start, before = await look()
    await asyncio.sleep(seconds)
    end, after = await look()
    speed = (after.tokens_total - before.tokens_total) / (end - start)
    sent = np.array(after.shard_tokens, dtype=np.float64) - np.array(before.shard_tokens, dtype=np.float64)
    return speed, imbalance(sent)


async def measure(nats_url: str, folder: Path, seconds: float) -> dict[str, Any]:
    bus = await Bus.connect(nats_url, "test", NAME)
    seen = Seen()
    await seen.fleet.watch(bus)
    await bus.watch(subjects.event("rebalance"), seen.on_event)
    arguments = ("--model", str(folder), "--experts", str(SHARDS), "--shards", str(SHARDS))
    async with contextlib.AsyncExitStack() as opened:
        url = await opened.enter_async_context(
            stack(
                *arguments,
                NATS_URL=nats_url,
                SIMULATED_PAIR_MS=SIMULATED_PAIR_MS,
                REBALANCE_MIN_TOKENS=MIN_TOKENS,
                REBALANCE="on",
            )
        )
        client = Client(url)
        tasks = [asyncio.create_task(stream(client, seen, n), name=f"stream:{n}") for n in range(STREAMS)]
        try:
            await _until(lambda: seen.tokens() > WARM_UP_TOKENS, "the streams to decode")
            speed, uneven = await window(seen, seconds)
            if seen.of("rebalance_planned"):
                raise SystemExit("the plan came before the first window was over; raise MIN_TOKENS")
            await _until(lambda: seen.of("rebalance_planned"), "a plan")
            planned = time.monotonic()
            await _until(seen.followed, "all to follow it")
            followed = time.monotonic()
            await _until(lambda: seen.of("rebalance_measured"), "the monitor to measure what came of it")
            faster, even = await window(seen, seconds)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            client.close()
    await bus.abort()
    during = [(at, s.tokens_total) for at, s in seen.reports if planned - 1 <= at <= followed + 3]
    slowest = min((b - a) / (later - at) for (at, a), (later, b) in itertools.pairwise(during) if later - at > 0.5)
    return {
        "tokens_per_second": [round(speed, 1), round(faster, 1)],
        "ratio": round(faster / speed, 2),
        "imbalance": [round(uneven, 2), round(even, 2)],
        "switch_seconds": round(followed - planned, 1),
        "slowest_second": round(slowest, 1),
        "failed": seen.failed,
        "said": [event.text for event in seen.events],
    }


async def _until(predicate: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PLAN_SECONDS
    while not predicate():
        if time.monotonic() > end:
            raise SystemExit(f"waited {PLAN_SECONDS:g} s for {what}")
        await asyncio.sleep(0.05)


async def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="openmoe-bench-") as temporary:
        folder = write("tiny", Path(temporary) / "skewed")
        skew(folder)
        port = free_port()
        async with process(binary(), "--config", str(write_config(Path(temporary), port, NAME))):
            await until(lambda: answers_as(port, NAME), "nats-server")
            print(json.dumps(await measure(f"nats://127.0.0.1:{port}", folder, arguments.seconds), indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, help="of each of the two windows")
    uvloop.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
