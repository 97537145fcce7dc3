"""What metrics and logs cost: `python -m bench.overhead [--checkpoint DIR]`.

Two stacks with ENV=production stand side by side and are loaded in turns, 16 streams each time (closed loop, random
prompts):

- on: METRICS=on, every /metrics scraped every five seconds (as deploy/prometheus does), LOG_LEVEL=INFO, logs to a file;
- off: METRICS=off, nothing scraped, LOG_LEVEL=ERROR.

Each round measures both and gives one ratio of their output tokens/s; who comes first changes from round to round, and
both are started anew, in the other order, after half of the rounds: equal stacks differ by some percent (`--control`
shows how much). Printed are the median of the ratios, its quartiles, the least and the greatest, and `cpu_ratio`, the
same of tokens per CPU second of the stack, which is less noisy. Exit code 1 if the median is under `--least`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import statistics
import sys
import tempfile
from collections import Counter
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import uvloop

from bench.stack import beside, stack
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


def scraping(clients: list[Client]) -> AbstractAsyncContextManager[None]:
    """Read every /metrics all the while, as Prometheus would."""
    return beside(lambda: asyncio.gather(*(_get(client, "/metrics") for client in clients)), SCRAPE_SECONDS)


@dataclass
class Turn:
    """What one turn came to."""

    tokens_per_second: float
    cpu_ms_per_token: float
    """Of all of the stack's processes."""


class Side:
    """One of the two stacks."""

    def __init__(self, client: Client, make: Requests, scraped: list[Client]) -> None:
        self._client, self._make, self.scraped = client, make, scraped
        port = client.url.rpartition(":")[2]
        self._services = [p for p in psutil.Process().children(recursive=True) if p.environ().get("PORT") == port]

    @classmethod
    async def start(
        cls, stacks: AsyncExitStack, settings: dict[str, str], log: Path, arguments: argparse.Namespace
    ) -> Side:
        """Start the stack and warm it up."""
        token = secrets.token_hex(16)
        model = ("--model", str(arguments.checkpoint), "--experts", str(arguments.experts))
        running = stack(*model, log=log, ENV="production", API_AUTH_TOKEN=token, **settings)
        url = await stacks.enter_async_context(running)
        client = Client(url, token)
        stacks.callback(client.close)
        plan = Plan(url, concurrency=(arguments.streams,), warmup=2 * arguments.streams, seed=arguments.seed)
        make = await prepare(plan, client, (await look_at(client))[0])
        return cls(client, make, await metrics_of(url, token) if settings["METRICS"] == "on" else [])

    def _cpu(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self._services)

    async def turn(self, number: int, arguments: argparse.Namespace) -> Turn:
        """Load it for a while."""
        traffic, length = Traffic(self._client, 120), Length(duration=arguments.seconds)
        before = self._cpu()
        async with scraping(self.scraped):
            start, seconds = await closed_loop(traffic, lambda n: self._make(number, n), arguments.streams, length)
        cpu = self._cpu() - before
        came = row("closed", arguments.streams, traffic.samples, start, seconds)
        if came.failed:
            raise SystemExit(f"requests failed: {came.failures}")
        return Turn(came.output_tokens_per_second, 1000 * cpu / (came.done * came.output_tokens))


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    modes = {"on": {"METRICS": "on", "LOG_LEVEL": "INFO"}, "off": {"METRICS": "off", "LOG_LEVEL": "ERROR"}}
    if arguments.control:
        modes["on"] = modes["off"]
    turns: dict[str, list[Turn]] = {mode: [] for mode in modes}
    lines, scraped = Counter[str](), 0
    for start in range(arguments.starts):
        with tempfile.TemporaryDirectory(prefix="openmoe-overhead-") as folder:
            logs = {mode: Path(folder) / f"{mode}.log" for mode in modes}
            async with AsyncExitStack() as stacks:
                sides: dict[str, Side] = {}
                for mode in sorted(modes, reverse=bool(start % 2)):
                    sides[mode] = await Side.start(stacks, modes[mode], logs[mode], arguments)
                scraped = len(sides["on"].scraped)
                for number in range(arguments.rounds):
                    for mode in sorted(modes, reverse=bool(number % 2)):
                        turns[mode].append(await sides[mode].turn(start * arguments.rounds + number, arguments))
            lines.update({mode: len(log.read_bytes().splitlines()) for mode, log in logs.items()})
    pairs = list(zip(turns["on"], turns["off"], strict=True))
    speed = sorted(on.tokens_per_second / off.tokens_per_second for on, off in pairs)
    cpu = sorted(off.cpu_ms_per_token / on.cpu_ms_per_token for on, off in pairs)
    return {
        "control": arguments.control,
        "streams": arguments.streams,
        "rounds": len(pairs),
        "log_lines": dict(lines),
        "scraped": scraped,
        **{
            f"{mode}_tokens_per_second": round(statistics.median(t.tokens_per_second for t in turns[mode]), 1)
            for mode in modes
        },
        **{
            f"{mode}_cpu_ms_per_token": round(statistics.median(t.cpu_ms_per_token for t in turns[mode]), 3)
            for mode in modes
        },
        "cpu_ratio": round(statistics.median(cpu), 3),
        "ratio": round(statistics.median(speed), 3),
        "ratio_quartiles": [round(q, 3) for q in statistics.quantiles(speed, n=4)[::2]] if len(speed) > 1 else [],
        "ratio_least": round(speed[0], 3),
        "ratio_greatest": round(speed[-1], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=DEMO_MODEL, help="a Hugging Face folder")
    parser.add_argument("--experts", type=int, default=2, help="expert workers of each stack")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--starts", type=int, default=2, help="how often both stacks are started anew")
    parser.add_argument("--rounds", type=int, default=10, help="of each start")
    parser.add_argument("--seconds", type=float, default=5, help="of each turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--least", type=float, default=0.97, help="a lower ratio is a failure")
    parser.add_argument("--control", action="store_true", help="both stacks off: how far chance alone goes")
    arguments = parser.parse_args()
    result = uvloop.run(measure(arguments))
    print(json.dumps(result, indent=1))
    sys.exit(0 if result["ratio"] >= arguments.least else 1)


if __name__ == "__main__":
    main()
