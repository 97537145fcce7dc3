"""Five times the load that can be served: what becomes of it? `python -m bench.overload --seconds 60`.

Starts a stack and measures its capacity with as many streams as the gateway has places (closed loop). Then requests
arrive at random (open loop): at 0.8 times the capacity, at `--times` it, and, `--pause` seconds later, at 0.8 times
again. Prints a table: latencies (p50 / p95) of the accepted requests, counted from when they were due, how many were
refused, how long it took to say so, and the most memory that the gateway and the router had. Exit code 1 if a request
failed in any other way than by a refusal with HTTP 429 or 503.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from bench.soak import mib, processes
from bench.stack import beside, stack
from services.benchmark import Length, Plan, Traffic, closed_loop, look_at, open_loop, prepare
from services.benchmark_figures import Distribution, Row, distribution, row
from services.benchmark_http import Client
from services.benchmark_requests import Requests, Sample, arrivals
from shared.settings import DEMO_MODEL

CALM = 0.8
SAMPLE_SECONDS = 0.5
REFUSED = ("HTTP 429", "HTTP 503")


@dataclass
class Phase:
    """One load, and what came of it."""

    name: str
    came: Row
    refusals: Distribution | None
    """Seconds from the send to the refusal."""
    memory: dict[str, float] = field(default_factory=dict)
    """The most MiB that each service had."""

    @property
    def refused(self) -> int:
        return sum(count for reason, count in self.came.failures.items() if reason.startswith(REFUSED))

    @property
    def failed(self) -> int:
        return self.came.failed - self.refused


def refused(sample: Sample) -> bool:
    return sample.failure is not None and sample.failure.startswith(REFUSED)


async def phase(name: str, client: Client, make: Requests, number: int, load: float, seconds: float) -> Phase:
    """Arrivals at `load` requests per second."""
    traffic, length, peak = Traffic(client, 120.0), Length(duration=seconds), dict[str, float]()
    watched = {service: p for service, p in processes().items() if service.startswith(("gateway", "router"))}

    def look() -> None:
        for service, process in watched.items():
            peak[service] = max(peak.get(service, 0.0), mib(process))

    async with beside(lambda: asyncio.to_thread(look), SAMPLE_SECONDS):
        start, window = await open_loop(traffic, lambda n: make(number, n), arrivals(load, number), length)
    came = row("open", load, traffic.samples, start, window, generator_cpu=0.0, also_failed=traffic.not_sent)
    return Phase(name, came, distribution([s.ended - s.sent for s in traffic.samples if refused(s)]), peak)


async def capacity(client: Client, make: Requests, streams: int, seconds: float) -> tuple[float, Row]:
    """Requests per second with all places taken, counted in the second half of the time; and the whole of it."""
    traffic, length = Traffic(client, 120.0), Length(duration=seconds)
    start, window = await closed_loop(traffic, lambda n: make(0, n), streams, length)
    came = sum(start + seconds / 2 < s.ended <= start + seconds for s in traffic.samples if s.failure is None)
    if not came:
        raise SystemExit("no request came back in time; raise --capacity-seconds")
    return came / (seconds / 2), row("closed", streams, traffic.samples, start, window, generator_cpu=0.0)


def milliseconds(times: Distribution | None) -> str:
    return f"{times.p50 * 1000:.0f} / {times.p95 * 1000:.0f}" if times else "-"


def table(phases: Sequence[Phase]) -> str:
    """Markdown."""
    lines = [
        "| load | due/s | accepted/s | refused | TTFT, ms | per token, ms | refusal, ms | gateway, router MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in phases:
        came, total = each.came, each.came.done + each.came.failed
        lines.append(
            f"| {each.name} | {came.load:.1f} | {came.done / came.seconds:.1f} | {each.refused / max(1, total):.0%} "
            f"| {milliseconds(came.time_to_first_token)} | {milliseconds(came.inter_token_latency)} "
            f"| {milliseconds(each.refusals)} | {', '.join(f'{m:.0f}' for _, m in sorted(each.memory.items()))} |"
        )
    return "\n".join(lines)


async def measure(arguments: argparse.Namespace) -> int:
    model = ("--model", str(arguments.checkpoint), "--experts", str(arguments.experts))
    async with stack(*model, LOG_LEVEL="WARNING", MAX_CONCURRENT_REQUESTS=str(arguments.places)) as url:
        plan = Plan(url, prompt_tokens=arguments.prompt_tokens, max_tokens=arguments.max_tokens)
        client = Client(url)
        try:
            make = await prepare(plan, client, (await look_at(client))[0])
            rate, most = await capacity(client, make, arguments.places, arguments.capacity_seconds)
            first, gaps = milliseconds(most.time_to_first_token), milliseconds(most.inter_token_latency)
            print(
                f"capacity: {rate:.1f} requests/s with {arguments.places} streams; TTFT {first} ms, per token {gaps} ms"
            )
            phases = [await phase(f"{CALM:g} × capacity", client, make, 1, CALM * rate, arguments.seconds)]
            name = f"{arguments.times:g} × capacity"
            phases.append(await phase(name, client, make, 2, arguments.times * rate, arguments.seconds))
            await asyncio.sleep(arguments.pause)
            name = f"{CALM:g} × capacity, {arguments.pause:g} s later"
            phases.append(await phase(name, client, make, 3, CALM * rate, arguments.seconds))
        finally:
            client.close()
    print(table(phases))
    for each in phases:
        if each.failed:
            print(f"{each.name}: {each.failed} failed: {each.came.failures}")
    return 1 if any(each.failed for each in phases) else 0


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=DEMO_MODEL, help="a Hugging Face folder")
    parser.add_argument("--experts", type=int, default=2, help="expert workers")
    parser.add_argument("--places", type=int, default=64, help="the gateway's MAX_CONCURRENT_REQUESTS")
    parser.add_argument("--times", type=float, default=5, help="overload: so many times the capacity")
    parser.add_argument("--seconds", type=float, default=60, help="of each load")
    parser.add_argument("--capacity-seconds", type=float, default=20)
    parser.add_argument("--pause", type=float, default=60, help="seconds between the overload and the last load")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=48)
    sys.exit(uvloop.run(measure(parser.parse_args(given))))


if __name__ == "__main__":
    main()
