"""Full load for long: is memory flat, and are tokens even? `python -m bench.soak --minutes 10`.

Starts a stack, keeps 16 streams busy (closed loop, random prompts, as `openmoe bench` sends them) and looks at the
memory of every process of the stack every few seconds. Prints one JSON object. Exit code 1 if

- the memory of a service grew by more than `--max-growth` of what it was after a tenth of the time, plus 4 MiB (what an
  allocator moves by itself): both are medians, of the samples around a tenth of the time and of the last tenth;
- the p99 of the inter-token latency is more than `--max-ratio` times its p50; or
- a request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import uvloop

from bench.stack import beside, stack
from services.benchmark import Length, Plan, Traffic, closed_loop, look_at, prepare
from services.benchmark_figures import row
from services.benchmark_http import Client
from shared.settings import DEMO_MODEL, MIB

NOISE_MIB = 4.0
SAMPLE_SECONDS = 3.0


@dataclass
class Memory:
    """The memory of one process: seconds since the start, and MiB."""

    times: list[float] = field(default_factory=list)
    mib: list[float] = field(default_factory=list)

    def between(self, start: float, end: float) -> float:
        """Median MiB from `start` to `end`; of the nearest sample, if there is none."""
        inside = [m for t, m in zip(self.times, self.mib, strict=True) if start <= t <= end]
        nearest = min(range(len(self.times)), key=lambda i: abs(self.times[i] - (start + end) / 2))
        return statistics.median(inside) if inside else self.mib[nearest]

    def slope(self, start: float) -> float:
        """MiB per minute from `start` on, by least squares."""
        kept = [(t, m) for t, m in zip(self.times, self.mib, strict=True) if t >= start]
        if len(kept) < 2:
            return 0.0
        times, mib = np.array(kept).T
        return float(np.polyfit(times / 60, mib, 1)[0])


def processes() -> dict[str, psutil.Process]:
    """The stack's processes (our descendants) by name: expert-1, router-3, nats-server."""
    found: dict[str, psutil.Process] = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            name = process.environ().get("INSTANCE", "").rpartition("-")[0]
            found[name or ("openmoe up" if "services.cli" in process.cmdline() else process.name())] = process
    return found


def mib(process: psutil.Process) -> float:
    """Proportional set size (shared pages counted once for all), where the system tells; else resident."""
    info = process.memory_full_info()
    return float(getattr(info, "pss", info.rss)) / MIB


def watched(memory: dict[str, Memory], start: float) -> AbstractAsyncContextManager[None]:
    """Sample every process into `memory` all the while."""
    known = processes()

    def sample() -> None:
        for name, process in known.items():
            with contextlib.suppress(psutil.NoSuchProcess):
                memory.setdefault(name, Memory()).mib.append(mib(process))
                memory[name].times.append(time.perf_counter() - start)

    return beside(lambda: asyncio.to_thread(sample), SAMPLE_SECONDS)


def growth(memory: dict[str, Memory], seconds: float, allowed: float) -> dict[str, dict[str, Any]]:
    """Per process: MiB after a tenth of the time and at the end, the slope, and whether that is flat."""
    result = {}
    for name, samples in sorted(memory.items()):
        early = samples.between(0.08 * seconds, 0.12 * seconds)
        late = samples.between(0.9 * seconds, seconds)
        result[name] = {
            "mib_at_a_tenth": round(early, 1),
            "mib_at_the_end": round(late, 1),
            "mib_per_minute": round(samples.slope(0.1 * seconds), 3),
            "flat": late <= early * (1 + allowed) + NOISE_MIB,
        }
    return result


async def soak(arguments: argparse.Namespace) -> dict[str, Any]:
    seconds = 60 * arguments.minutes
    model = ("--model", str(arguments.checkpoint), "--experts", str(arguments.experts))
    async with stack(*model, *(("--routers", str(arguments.routers)) if arguments.routers > 1 else ())) as url:
        plan = Plan(
            url,
            concurrency=(arguments.streams,),
            length=Length(duration=seconds),
            prompt_tokens=arguments.prompt_tokens,
            max_tokens=arguments.max_tokens,
            seed=arguments.seed,
            warmup=arguments.streams,
        )
        client, memory = Client(url), dict[str, Memory]()
        traffic = Traffic(client, plan.timeout)
        try:
            make = await prepare(plan, client, (await look_at(client))[0])
            began = set(processes().values())
            async with watched(memory, time.perf_counter()):
                start, _ = await closed_loop(traffic, lambda n: make(0, n), arguments.streams, plan.length)
            ended = set(processes().values())
        finally:
            client.close()
    came = row("closed", arguments.streams, traffic.samples, start, seconds)
    gaps = came.inter_token_latency
    if gaps is None:
        raise SystemExit(f"no token came back: {came.failures}")
    ratio = gaps.p99 / gaps.p50
    services = growth(memory, seconds, arguments.max_growth)
    problems = [f"{name} grew" for name, figures in services.items() if not figures["flat"]]
    problems += [f"p99 of the inter-token latency is {ratio:.2f} times its p50"] if ratio > arguments.max_ratio else []
    problems += [f"{came.failed} requests failed"] if came.failed else []
    problems += ["a process was restarted"] if began != ended else []
    return {
        "minutes": arguments.minutes,
        "streams": arguments.streams,
        "prompt_tokens": arguments.prompt_tokens,
        "max_tokens": arguments.max_tokens,
        "requests": came.done,
        "failures": came.failures,
        "output_tokens_per_second": round(came.output_tokens_per_second, 1),
        "inter_token_ms": {q: round(getattr(gaps, q) * 1000, 2) for q in ("p50", "p95", "p99", "max")},
        "p99_over_p50": round(ratio, 2),
        "memory": services,
        "problems": problems,
    }


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--checkpoint", type=Path, default=DEMO_MODEL, help="a Hugging Face folder")
    parser.add_argument("--experts", type=int, default=2, help="expert workers")
    parser.add_argument("--routers", type=int, default=1)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-growth", type=float, default=0.05, help="share of the memory; 4 MiB come on top")
    parser.add_argument("--max-ratio", type=float, default=3.0, help="p99 over p50 of the inter-token latency")
    result = uvloop.run(soak(parser.parse_args(given)))
    print(json.dumps(result, indent=1))
    sys.exit(1 if result["problems"] else 0)


if __name__ == "__main__":
    main()
