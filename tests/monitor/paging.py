"""The monitor's page on a real nats-server, and fleets for it to show."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from services.monitor.page.server import serving
from services.monitor.page.view import View
from services.monitor.sight import Sight
from shared.bus import Bus
from shared.histogram import Histogram
from shared.service import listen
from shared.status import Fleet, Status
from tests.monitor.keeping import DEPLOYMENT

LAYERS = 4
EXPERTS = 16


@dataclass
class Load:
    """What a fleet has done so far; grows by `work`."""

    tokens: int = 0
    requests: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    experts: list[list[int]] = field(default_factory=lambda: [[0] * EXPERTS for _ in range(LAYERS)])
    first: Histogram = field(default_factory=Histogram)
    between: Histogram = field(default_factory=Histogram)
    whole: Histogram = field(default_factory=Histogram)

    def work(self, times: int = 1) -> None:
        for n in range(times):
            self.tokens += 24
            self.requests += 1
            for layer, row in enumerate(self.experts):
                for expert in range(EXPERTS):
                    row[expert] += 48 // (1 + (expert * 7 + layer * 3) % EXPERTS)
            for _ in range(10):
                self.first.observe(0.030 + 0.004 * (n % 7))
                self.between.observe(0.006 + 0.001 * (n % 3))
                self.whole.observe(0.200 + 0.02 * (n % 5))
            self.first.observe(0.31)


def fleet(load: Load, **changes: Any) -> list[Status]:
    """One gateway, two routers and three workers of two shards, all busy; `changes` of every report."""
    usage: dict[str, Any] = {
        "started": 1.0,
        "state": "ready",
        "host": "node-1",
        "cpu": 0.42,
        "cores": 2.0,
        "memory_bytes": 210 * 2**20,
        "memory_limit_bytes": 8 * 2**30,
        "memory_available_bytes": 5 * 2**30,
    } | changes
    model: dict[str, Any] = usage | {"deployment": DEPLOYMENT, "model": "demo", "num_shards": 2}
    rows = tuple(tuple(row) for row in load.experts)
    latencies = {
        "time_to_first_token": load.first.counts(),
        "inter_token": load.between.counts(),
        "end_to_end": load.whole.counts(),
    }
    return [
        Status(
            service="gateway",
            instance="gateway-1",
            tokens_total=load.tokens,
            requests_total=load.requests,
            errors=load.errors,
            latencies=latencies,
            running=5,
            waiting=1,
            cache_lookups=load.requests,
            cache_hits=load.requests // 3,
            **usage,
        ),
        *(
            Status(service="router", instance=f"router-{n}", kv_usage=0.31, running=3, expert_tokens=rows, **model)
            for n in (1, 2)
        ),
        *(
            Status(service="expert", instance=f"expert-{n}", shards=shards, tokens_total=load.tokens * n, **model)
            for n, shards in ((1, (0,)), (2, (1,)), (3, (0, 1)))
        ),
        Status(service="monitor", instance="monitor-1", state_stored=True, **usage),
    ]


@dataclass
class Page:
    """A page that is served, and what it shows."""

    url: str
    view: View
    sight: Sight


@contextlib.asynccontextmanager
async def served(nats_url: str = "nats://127.0.0.1:4222") -> AsyncIterator[Page]:
    """The page, before there is a connection."""
    sight = Sight("monitor-1")
    view = View(sight, nats_url)
    listener = listen("MONITOR_PORT", "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    async with serving(view, listener):
        yield Page(url, view, sight)


@contextlib.asynccontextmanager
async def watching(page: Page, bus: Bus) -> AsyncIterator[None]:
    """Let the page hear everybody on `bus`, as the monitor does."""
    heard = Fleet(tell=page.sight.tell)
    await heard.watch(bus)
    await page.view.watch(bus)
    task = asyncio.create_task(page.view.run(), name="page")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def remember_an_hour(page: Page, *, minutes: int = 55) -> None:
    """Fill the hour with points as a day's wave, and a gap of unknown between."""
    from services.monitor.timeline import STEP_SECONDS, Point

    steps = int(minutes * 60 / STEP_SECONDS)
    now, monotonic = time.time(), time.monotonic()
    for n in range(steps, 0, -1):
        at = now - n * STEP_SECONDS
        wave = 1 + ((n * 7) % 40) / 40 + (2 if 60 < n < 140 else 0)
        known = not 180 < n < 200
        page.view.timeline.add(
            Point(
                at,
                tokens_per_second=310 * wave,
                requests_per_second=12 * wave,
                failures_per_second=0.0,
                first_token_p50_ms=22 * wave,
                first_token_p95_ms=40 * wave,
                first_token_p99_ms=55 * wave,
                inter_token_p95_ms=6 * wave,
                end_to_end_p95_ms=180 * wave,
                running=int(3 * wave),
                waiting=int(wave),
                ready_experts=3 if n > 100 else 2,
                ready_routers=2,
            )
            if known
            else Point(at),
            monotonic - n * STEP_SECONDS,
        )
