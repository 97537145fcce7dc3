"""What metrics and logs cost: `python -m bench.overhead [--checkpoint DIR]`.

Two stacks with ENV=production stand side by side and are loaded in turns, 16 streams each time (closed loop, random
prompts):

- on: METRICS=on, every /metrics scraped every five seconds (as deploy/prometheus does), LOG_LEVEL=INFO, logs to a file;
- off: METRICS=off, nothing scraped, LOG_LEVEL=ERROR.

Each round measures both, the order changing from round to round, and gives one ratio of their output tokens/s; printed
are the median, the least and the greatest. Exit code 1 if the median is under `--least`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import secrets
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import psutil
import uvloop

from bench.stack import stack
from services.benchmark import Length, Plan, Traffic, closed_loop, look_at, prepare
from services.benchmark_figures import row
from services.benchmark_http import Client
from services.benchmark_requests import Requests
from shared.settings import DEMO_MODEL

SCRAPE_SECONDS = 5.0
FAMILY = b"\nmoe_"


async def _get(client: Client, path: str) -> bytes:
    pieces: list[bytes] = []
    status, _ = await client.ask("GET", path, b"", pieces.append)
    return b"".join(pieces) if status == 200 else b""


async def metrics_of(url: str, token: str) -> list[Client]:
    """A client for each /metrics of the stack at `url`: its gateway's, and those that its processes listen on."""
    port = int(url.rpartition(":")[2])
    found = [Client(url, token)]
    for process in psutil.Process().children(recursive=True):
        if process.environ().get("PORT") != str(port):  # each service is told its gateway's port: how stacks differ
            continue
        ports = {c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        found += [Client(f"http://127.0.0.1:{number}") for number in ports - {port}]
    answers = await asyncio.gather(*(_get(client, "/metrics") for client in found))
    if not all(FAMILY in answer for answer in answers) or len(found) < 4:
        raise SystemExit(f"/metrics of some of {[client.url for client in found]} has no metrics of ours")
    return found


@contextlib.asynccontextmanager
async def scraping(clients: list[Client]) -> AsyncIterator[None]:
    """Read every /metrics all the while, as Prometheus would."""

    async def scrape() -> None:
        while True:
            await asyncio.gather(*(_get(client, "/metrics") for client in clients))
            await asyncio.sleep(SCRAPE_SECONDS)

    task = asyncio.create_task(scrape(), name="scrape")
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def throughput(
    client: Client, make: Requests, scraped: list[Client], number: int, arguments: argparse.Namespace
) -> float:
    """Output tokens/s of one turn."""
    traffic = Traffic(client, 120)
    async with scraping(scraped):
        start, seconds = await closed_loop(
            traffic, lambda n: make(number, n), arguments.streams, Length(duration=arguments.seconds)
        )
    came = row("closed", arguments.streams, traffic.samples, start, seconds)
    if came.failed:
        raise SystemExit(f"requests failed: {came.failures}")
    return came.output_tokens_per_second


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    token = secrets.token_hex(16)
    model = ("--model", str(arguments.checkpoint), "--experts", str(arguments.experts))
    modes = {"on": {"METRICS": "on", "LOG_LEVEL": "INFO"}, "off": {"METRICS": "off", "LOG_LEVEL": "ERROR"}}
    speeds: dict[str, list[float]] = {mode: [] for mode in modes}
    clients: dict[str, Client] = {}
    makers: dict[str, Requests] = {}
    scraped: dict[str, list[Client]] = {}
    with tempfile.TemporaryDirectory(prefix="openmoe-overhead-") as folder:
        logs = {mode: Path(folder) / f"{mode}.log" for mode in modes}
        async with AsyncExitStack() as stacks:
            for mode, settings in modes.items():
                environment = {"ENV": "production", "API_AUTH_TOKEN": token, **settings}
                url = await stacks.enter_async_context(stack(*model, log=logs[mode], **environment))
                clients[mode] = Client(url, token)
                stacks.callback(clients[mode].close)
                plan = Plan(url, concurrency=(arguments.streams,), warmup=arguments.streams, seed=arguments.seed)
                makers[mode] = await prepare(plan, clients[mode], (await look_at(clients[mode]))[0])
                scraped[mode] = await metrics_of(url, token) if mode == "on" else []
            for number in range(arguments.rounds):
                for mode in sorted(modes, reverse=bool(number % 2)):
                    speed = await throughput(clients[mode], makers[mode], scraped[mode], number, arguments)
                    speeds[mode].append(speed)
        lines = {mode: len(log.read_bytes().splitlines()) for mode, log in logs.items()}
    ratios = sorted(on / off for on, off in zip(speeds["on"], speeds["off"], strict=True))
    return {
        "streams": arguments.streams,
        "on_tokens_per_second": [round(speed, 1) for speed in speeds["on"]],
        "off_tokens_per_second": [round(speed, 1) for speed in speeds["off"]],
        "log_lines": lines,
        "scraped": len(scraped["on"]),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_least": round(ratios[0], 3),
        "ratio_greatest": round(ratios[-1], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=DEMO_MODEL, help="a Hugging Face folder")
    parser.add_argument("--experts", type=int, default=2, help="expert workers of each stack")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=15, help="of each turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--least", type=float, default=0.97, help="a lower ratio is a failure")
    arguments = parser.parse_args()
    result = uvloop.run(measure(arguments))
    print(json.dumps(result, indent=1))
    sys.exit(0 if result["ratio"] >= arguments.least else 1)


if __name__ == "__main__":
    main()
