"""`openmoe load URL`: open-loop load with limits to pass or fail.

One open-loop row of `openmoe bench` (services/benchmark.py), with prompts of text. Latency
counts from the scheduled send.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from services.benchmark import COLUMNS, Length, Traffic, open_loop, showing
from services.benchmark_figures import Row, row
from services.benchmark_http import Client
from services.benchmark_requests import Request, arrivals, generation

PROMPTS = ("import os\n", "def read_file(path):", "class Parser:\n", "for line in ", "try:\n    ", "# Sort the list")


@dataclass(frozen=True)
class Load:
    """What is sent, and what counts as passed."""

    url: str
    rate: float
    """Requests per second, arriving at random (Poisson)."""
    duration: float
    """Seconds."""
    max_tokens: int = 16
    stream: bool = True
    timeout: float = 60
    api_key: str | None = field(default=None, repr=False)
    seed: int = 0
    """Of arrival times and prompts; a seed that was used before may meet answers that are cached."""
    max_failures: int = 0
    max_p99: float | None = None
    """Seconds."""


def verdict(load: Load, came: Row) -> list[str]:
    """Why the run did not pass; empty if it did."""
    reasons = []
    if came.failed > load.max_failures:
        reasons.append(f"{came.failed} requests failed, at most {load.max_failures} may")
    if came.latency is None:
        reasons.append("no request came back" if came.failed else "no request was due; raise the rate or the duration")
    elif load.max_p99 is not None and came.latency.p99 > load.max_p99:
        reasons.append(f"p99 is {came.latency.p99:.3f} s, at most {load.max_p99:g} s may be")
    return reasons


def _request(load: Load, number: int) -> Request:
    # Each prompt is new, so that no cache answers in the model's place.
    prompt = f"# {load.seed}.{number}\n{PROMPTS[number % len(PROMPTS)]}"
    return generation("/v1/completions", {"prompt": prompt}, None, load.max_tokens, stream=load.stream)


async def run(load: Load, console: Console) -> Row:
    """Send the load and wait for what is in flight; each request has its own deadline.

    Raises:
        StartError: the URL or the key cannot be used.

    """
    client = Client(load.url, load.api_key)
    traffic, length = Traffic(client, load.timeout), Length(duration=load.duration)
    cpu, began = time.process_time(), time.perf_counter()
    try:
        with Progress(*COLUMNS, console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task("load", total=load.duration, note="")
            async with showing(progress, bar, traffic, length):
                start, _ = await open_loop(
                    traffic, lambda number: _request(load, number), arrivals(load.rate, load.seed), length
                )
    finally:
        client.close()
    ended = time.perf_counter()
    share = (time.process_time() - cpu) / (ended - began)
    # Up to the last answer: the rate that is shown is that of all that was asked for.
    return row(
        "open", load.rate, traffic.samples, start, ended - start, generator_cpu=share, also_failed=traffic.not_sent
    )


def load_table(load: Load, came: Row) -> Table:
    """The report."""
    table = Table("figure", "value")
    table.add_row("requests", f"{came.done} done, {came.failed} failed, {load.rate:g}/s asked for")
    table.add_row("output tokens/s", f"{came.output_tokens_per_second:.1f}")
    for name, times in (("latency", came.latency), ("first token", came.time_to_first_token)):
        if times:
            parts = f"p50 {times.p50:.3f} p95 {times.p95:.3f} p99 {times.p99:.3f} max {times.max:.3f}"
            table.add_row(f"{name} (s, from the scheduled send)", parts)
    for reason, count in list(came.failures.items())[:8]:
        said = f": {came.examples[reason]}" if reason in came.examples else ""
        table.add_row("failed", f"{count} × {reason}{said}".replace("[", "\\["))
    return table
