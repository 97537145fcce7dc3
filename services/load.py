"""`openmoe load URL`: open-loop load. Requests start when they are due, whether or not earlier ones have come back.

Latency counts from the scheduled send: a server that stalls cannot slow the load down and so hide its stall (known as
coordinated omission).
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

PROMPTS = ("import os\n", "def read_file(path):", "class Parser:\n", "for line in ", "try:\n    ", "# Sort the list")
MAX_IN_FLIGHT = 10_000


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
    api_key: str | None = None
    seed: int = 0
    """Of arrival times and prompts; a seed that was used before may meet answers that are cached."""
    max_failures: int = 0
    max_p99: float | None = None
    """Seconds."""


@dataclass
class Outcome:
    """What came of it. Times are seconds from the scheduled send."""

    latencies: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    tokens: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def failed(self) -> int:
        return self.failures.total()


def quantile(values: Sequence[float], q: float) -> float:
    """By nearest rank; NaN of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)] if ordered else math.nan


def verdict(load: Load, outcome: Outcome) -> list[str]:
    """Why the run did not pass; empty if it did."""
    reasons = []
    if outcome.failed > load.max_failures:
        reasons.append(f"{outcome.failed} requests failed, at most {load.max_failures} may")
    p99 = quantile(outcome.latencies, 0.99)
    if load.max_p99 is not None and not p99 <= load.max_p99:
        reasons.append(f"p99 is {p99:.3f} s, at most {load.max_p99:g} s may be")
    if not outcome.latencies:
        reasons.append("no request came back")
    return reasons


async def _one(http: httpx.AsyncClient, load: Load, number: int, due: float, outcome: Outcome) -> None:
    body = {
        # Each prompt is new, so that no cache answers in the model's place.
        "prompt": f"# {load.seed}.{number}\n{PROMPTS[number % len(PROMPTS)]}",
        "max_tokens": load.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": load.stream,
    }
    try:
        if load.stream:
            tokens = await _streamed(http, body, due, outcome)
        else:
            answer = await http.post("/v1/completions", json=body)
            answer.raise_for_status()
            tokens = int(answer.json()["usage"]["completion_tokens"])
    except httpx.HTTPStatusError as error:
        outcome.failures[f"HTTP {error.response.status_code}"] += 1
    except (httpx.HTTPError, ValueError, KeyError) as error:
        outcome.failures[f"{type(error).__name__}: {error}"[:120]] += 1
    else:
        outcome.tokens += tokens
        outcome.latencies.append(time.monotonic() - due)


async def _streamed(http: httpx.AsyncClient, body: dict[str, object], due: float, outcome: Outcome) -> int:
    """Read one stream to its end; the number of its tokens."""
    tokens, first, done = 0, True, False
    asked = {**body, "stream_options": {"include_usage": True}}
    async with http.stream("POST", "/v1/completions", json=asked) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise ValueError(event["error"]["message"])
                if first:
                    outcome.first_tokens.append(time.monotonic() - due)
                    first = False
                if event.get("usage"):
                    tokens = int(event["usage"]["completion_tokens"])
    if not done:
        raise ValueError("the stream ended without [DONE]")
    return tokens


async def run(load: Load, console: Console) -> Outcome:
    """Send the load and wait for what is in flight; each request has its own deadline."""
    outcome = Outcome()
    draw = random.Random(load.seed)  # noqa: S311 - arrival times, not secrets
    headers = {"Authorization": f"Bearer {load.api_key}"} if load.api_key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    async with httpx.AsyncClient(
        base_url=load.url, headers=headers, timeout=load.timeout, limits=limits, trust_env=False
    ) as http:
        start = due = time.monotonic()
        tasks: set[asyncio.Task[None]] = set()
        number = 0
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task("load", total=load.duration, note="")
            async with asyncio.TaskGroup() as group:
                while (due := due + draw.expovariate(load.rate)) < start + load.duration:
                    await asyncio.sleep(max(0.0, due - time.monotonic()))
                    if len(tasks) >= MAX_IN_FLIGHT:
                        outcome.failures["too many in flight"] += 1
                        continue
                    task = group.create_task(_one(http, load, number, due, outcome), name=f"request:{number}")
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                    number += 1
                    note = f"{number} sent, {len(tasks)} in flight, {outcome.failed} failed"
                    progress.update(bar, completed=due - start, note=note)
        outcome.seconds = time.monotonic() - start
    return outcome


def load_table(load: Load, outcome: Outcome) -> Table:
    """The report."""
    table = Table("figure", "value")
    done = len(outcome.latencies)
    table.add_row("requests", f"{done} done, {outcome.failed} failed, {load.rate:g}/s asked for")
    table.add_row("output tokens/s", f"{outcome.tokens / max(outcome.seconds, 1e-9):.1f}")
    for name, values in (("latency", outcome.latencies), ("first token", outcome.first_tokens)):
        if values:
            parts = " ".join(f"p{q * 100:g} {quantile(values, q):.3f}" for q in (0.5, 0.95, 0.99))
            table.add_row(f"{name} (s, from the scheduled send)", f"{parts} max {max(values):.3f}")
    for reason, count in outcome.failures.most_common(8):
        table.add_row("failed", f"{count} × {reason}".replace("[", "\\["))
    return table
