"""What scaling gains: `python -m bench.scaling [--workers 2,4,2] [--streams 16] [--seconds 8] [--pair-ms 4]`.

One stack of `openmoe up` under `streams` completions at a time; between the measurements `openmoe scale` changes the
number of its expert workers, while the completions go on. Workers sleep in place of computing (SIMULATED_PAIR_MS), so
that each has a capacity of its own whatever cores there are; router, bus and gateway are real. Printed is a JSON object
for each number of workers: tokens per second, and how many requests have failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from bench.stack import stack
from services.scale_command import scale
from shared.bus import Bus
from shared.status import Fleet

MAX_TOKENS = 16
SETTLE_SECONDS = 3.0
READY_SECONDS = 60.0


@dataclass
class Streams:
    """Completions, so many at a time, one after the other."""

    url: str
    tokens: int = 0
    failed: int = 0
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def ask(self, client: httpx.AsyncClient, number: int) -> None:
        body = {"prompt": f"{number}", "max_tokens": MAX_TOKENS, "ignore_eos": True}
        while True:
            answer = await client.post("/v1/completions", json=body)
            if answer.status_code == 200:
                self.tokens += answer.json()["usage"]["completion_tokens"]
            else:
                self.failed += 1
                await asyncio.sleep(0.1)


async def ready(nats_url: str, count: int) -> None:
    """Wait until `count` workers are ready, and no others are left.

    Raises:
        TimeoutError: they are not.

    """
    bus = await Bus.connect(nats_url, "bench", "bench-scaling")
    fleet = Fleet()
    try:
        await fleet.watch(bus)
        async with asyncio.timeout(READY_SECONDS):
            while [s.state for s in fleet.live("expert")] != ["ready"] * count:
                await asyncio.sleep(0.1)
    finally:
        await bus.abort()


async def measure(arguments: argparse.Namespace) -> None:
    counts = [int(word) for word in arguments.workers.split(",")]
    settings = {
        "SIMULATED_PAIR_MS": str(arguments.pair_ms),
        "SCALING_EXECUTOR": "local",
        "SCALING_COOLDOWN_SECONDS": "3600",
        "MIN_WORKERS": str(min(counts)),
        "MAX_WORKERS": str(max(counts)),
        "ENABLE_CACHING": "false",
    }
    options = ("--experts", str(counts[0]), "--shards", str(arguments.shards or counts[0]))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        async with stack(*options, log=log, **settings) as url, httpx.AsyncClient(base_url=url, timeout=120) as client:
            nats_url = re.findall(r"^nats-server (nats://\S+)$", log.read_text(), re.MULTILINE)[0]
            streams = Streams(url)
            streams.tasks = [asyncio.create_task(streams.ask(client, n)) for n in range(arguments.streams)]
            try:
                for count in counts:
                    await scale(nats_url, {"expert": count}, READY_SECONDS)
                    await ready(nats_url, count)
                    await asyncio.sleep(SETTLE_SECONDS)
                    start, before = time.monotonic(), streams.tokens
                    await asyncio.sleep(arguments.seconds)
                    speed = (streams.tokens - before) / (time.monotonic() - start)
                    print(
                        json.dumps({"workers": count, "tokens_per_second": round(speed, 1), "failed": streams.failed})
                    )
            finally:
                for task in streams.tasks:
                    task.cancel()
                await asyncio.gather(*streams.tasks, return_exceptions=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="2,4,2", help="one after the other")
    parser.add_argument("--shards", type=int, help="default: as many as workers at first")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--pair-ms", type=float, default=4)
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
