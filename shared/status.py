"""Status reports: every service publishes one each second on `moe.status.<service>.<instance>`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from typing import Annotated, Literal

import msgspec
import psutil
import structlog
from nats.aio.msg import Msg

from shared import subjects, wire
from shared.bus import Bus
from shared.errors import BadMessageError, MoeError
from shared.histogram import BOUNDS
from shared.instrumentation import BAD_MESSAGES
from shared.memory import memory

log = structlog.get_logger()

STATUS_INTERVAL_SECONDS = 1.0
STALE_SECONDS = 3.5
MAX_INSTANCES = 4096
"""Of a fleet; the reports of more are not looked at."""
MAX_SHARDS = 1024
MAX_LAYERS = 1024

Name = Annotated[str, msgspec.Meta(max_length=256)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
Buckets = Annotated[tuple[Count, ...], msgspec.Meta(max_length=len(BOUNDS) + 1)]
Shards = Annotated[tuple[Annotated[int, msgspec.Meta(ge=0, lt=MAX_SHARDS)], ...], msgspec.Meta(max_length=MAX_SHARDS)]

State = Literal["starting", "loading", "ready", "draining"]


class Status(wire.Message, frozen=True, kw_only=True):
    """One instance's report about itself. Times are seconds, sizes bytes, `cpu` a share of one core."""

    service: Name
    instance: Name
    deployment: Name = ""
    model: Name = ""
    state: State = "starting"
    pid: Count = 0
    host: Name = ""
    started: Seconds = 0.0
    """Unix time of the process' start: orders workers that start together."""
    address: Name = ""
    """host:port of this instance's /metrics."""
    num_shards: Annotated[int, msgspec.Meta(ge=0, le=MAX_SHARDS)] = 0
    shards: Shards = ()
    """Shards that an expert worker serves now."""
    wanted_shards: Shards = ()
    """Shards that it is loading."""
    pinned: bool = False
    """Its shards are set by the operator: it takes no others over."""
    loaded_bytes: Count = 0
    total_bytes: Count = 0
    running: Count = 0
    waiting: Count = 0
    max_model_len: Count = 0
    kv_usage: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    """Share of the KV blocks in use, 0 to 1."""
    tokens_total: Count = 0
    requests_total: Count = 0
    errors_total: Count = 0
    cpu: Seconds = 0.0
    cores: Seconds = 0.0
    """Cores that it can keep busy; 0: unknown."""
    busy_seconds: Seconds = 0.0
    """Workers: how long they have computed since the start, without what calls waited for each other."""
    memory_bytes: Count = 0
    memory_limit_bytes: Count = 0
    """What there is for it and its neighbours: the control group's limit, or the machine's memory; 0: unknown."""
    memory_available_bytes: Count = 0
    """Of these, what is left."""
    queue_limit: Count = 0
    """The most that may wait; 0: unknown."""
    latencies: Annotated[dict[Name, Buckets], msgspec.Meta(max_length=16)] = msgspec.field(default_factory=dict)
    """Seconds since the start as counts per bucket (shared/histogram.py). Gateways: `time_to_first_token`,
    `inter_token`, `end_to_end`; routers: `queue`, `step`; workers: `compute`."""
    errors: Annotated[dict[Name, Count], msgspec.Meta(max_length=64)] = msgspec.field(default_factory=dict)
    """Failed requests since the start, by the error's code."""
    cache_lookups: Count = 0
    cache_hits: Count = 0
    """Gateways: answers that were looked up and found since the start."""
    epoch: Count = 0
    """Of the placement: workers have loaded it, routers dispatch by it; 0: none was told."""
    expert_tokens: Annotated[tuple[tuple[Count, ...], ...], msgspec.Meta(max_length=MAX_LAYERS)] = ()
    """Routers: tokens sent to each expert since the start, [MoE layers][experts]."""
    shard_tokens: Annotated[tuple[tuple[Count, ...], ...], msgspec.Meta(max_length=MAX_LAYERS)] = ()
    """Routers: pairs of a token and an expert sent to each shard since the start, [MoE layers][shards]."""
    state_stored: bool = False
    """Monitors: whether their state is kept in JetStream now."""


class StatusReporter:
    """Publishes `make()` each second, and at once when `touch`ed."""

    def __init__(self, bus: Bus, make: Callable[[], Status]) -> None:
        self._bus = bus
        self._make = make
        self._changed = asyncio.Event()
        self._process = psutil.Process(os.getpid())

    def touch(self) -> None:
        self._changed.set()

    async def publish(self) -> None:
        status = self._make()
        with contextlib.suppress(MoeError):  # disconnected: the next second's report says more
            await self._bus.publish(subjects.status(status.service, status.instance), wire.encode(status))

    def with_usage(self, status: Status) -> Status:
        """`status` with what this process takes, and what its neighbours leave."""
        limit, available = memory()
        return msgspec.structs.replace(
            status,
            cpu=self._process.cpu_percent() / 100,
            memory_bytes=int(self._process.memory_info().rss),
            memory_limit_bytes=limit,
            memory_available_bytes=available,
        )

    async def run(self) -> None:
        while True:
            try:
                await self.publish()
            except Exception:  # a report that cannot be made must not silence all later ones
                log.exception("status.failed")
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STATUS_INTERVAL_SECONDS):
                    await self._changed.wait()


class Fleet:
    """Everybody's last report, by (service, instance); who has been silent for too long is forgotten."""

    def __init__(
        self, stale_seconds: float = STALE_SECONDS, *, tell: Callable[[Status, float], None] | None = None
    ) -> None:
        """Know nobody yet.

        Args:
            stale_seconds: who is silent for longer is forgotten.
            tell: is told of each report, and of when it came on the monotonic clock.

        """
        self._stale_seconds = stale_seconds
        self._tell = tell
        self._seen: dict[tuple[str, str], tuple[float, Status]] = {}

    async def watch(self, bus: Bus) -> None:
        await bus.watch(subjects.STATUS_ALL, self.on_message)

    def on_message(self, message: Msg) -> None:
        try:
            service, instance = subjects.parse_status(message.subject)
            status = wire.decode(Status, message.data)
        except (BadMessageError, ValueError):
            BAD_MESSAGES.labels("status").inc()
            return
        known = (service, instance) in self._seen or len(self._seen) < MAX_INSTANCES
        if (status.service, status.instance) == (service, instance) and known:
            self.observe(status, time.monotonic())
        else:
            BAD_MESSAGES.labels("status").inc()

    def observe(self, status: Status, now: float) -> None:
        self._seen[status.service, status.instance] = (now, status)
        if self._tell is not None:
            self._tell(status, now)

    def live(self, service: str | None = None, *, now: float | None = None) -> list[Status]:
        """Reports of the instances that were heard of lately, ordered by service and instance."""
        now = time.monotonic() if now is None else now
        for key in [k for k, (seen, _) in self._seen.items() if now - seen > self._stale_seconds]:
            del self._seen[key]
        return [s for (name, _), (_, s) in sorted(self._seen.items()) if service is None or name == service]

    def heard(self, service: str) -> list[tuple[float, Status]]:
        """(when it came, on the monotonic clock; the report) of each instance of `service` that is not forgotten."""
        return [seen for (name, _), seen in self._seen.items() if name == service]

    def covered_shards(self, deployment: str) -> set[int]:
        """Shards of `deployment` that at least one ready worker serves."""
        return {
            shard
            for s in self.live("expert")
            if s.deployment == deployment and s.state == "ready"
            for shard in s.shards
        }
