"""The processes of a simulated fleet: the real services, with stand-ins for the model's numbers, threads and HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest import mock

import services.expert.copies as copies_module
import services.expert.worker as expert_module
import services.router.engine as engine_module
import services.router.service as router_module
import shared.bus as bus_module
import shared.status as status_module
from services.expert.worker import Worker
from services.gateway.admission import Admission
from services.gateway.answers import Answers
from services.gateway.generation import Generator, Observations
from services.router.service import Router
from shared.bus import Bus
from shared.replicas import Replicas
from shared.service import service_context
from shared.settings import ExpertSettings, GatewaySettings, RouterSettings, ServiceSettings
from shared.status import Fleet, Status
from tests.simulation.loop import Process, process
from tests.simulation.nats import SimulatedConnection, SimulatedServer
from tests.simulation.numerics import (
    SimulatedBank,
    SimulatedEngine,
    SimulatedModel,
    make_config,
    simulated_forward,
)
from tests.simulation.plan import CHARACTERS, Kind, Plan

S = TypeVar("S", bound=ServiceSettings)

DEPLOYMENT = "simulated-00000000"
GRACE_SECONDS = 10.0
COPIES_GRACE_SECONDS = 1.0
"""So short that calls by an old plan meet workers that have dropped its copies."""


class Words:
    """A tokenizer: one character for each token."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(CHARACTERS[token] for token in ids)


class SimulatedCompute:
    """The compute thread: takes simulated time, then computes at once."""

    async def __call__(self, function: Callable[..., Any], *args: Any, rows: int | None = None) -> Any:
        owner = process.get()
        assert owner is not None
        loading = getattr(function, "__name__", "") == "load"
        await asyncio.sleep(owner.load_seconds() if loading else owner.compute_seconds())
        return function(*args)

    def close(self) -> None:
        """There is no thread."""


class NoProcess:
    """In place of psutil's: figures that are the same each time."""

    def __init__(self, _pid: int) -> None:
        pass

    def cpu_percent(self) -> float:
        return 0.0

    def memory_info(self) -> SimpleNamespace:
        return SimpleNamespace(rss=1)


def base_status(_settings: object, service: str, instance: str, address: str) -> Status:
    return Status(
        service=service, instance=instance, model="simulated", pid=1, host="host", started=time.time(), address=address
    )


class Gateway:
    """A gateway without HTTP: what services/gateway/service.py builds around its Generator."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.settings = settings
        assert settings.instance is not None
        self.instance = settings.instance
        self.ready = False
        self.draining = False
        self.requests: dict[asyncio.Task[None], None] = {}
        """Those in flight."""

    async def run(self, shutdown: asyncio.Event) -> None:
        s = self.settings
        async with service_context(s, "gateway", self.instance, self._status) as context:
            self.bus: Bus = context.bus
            routers = Replicas("router", DEPLOYMENT)
            await Fleet(tell=routers.observe).watch(self.bus)
            self.admission = Admission(
                s.max_concurrent_requests, s.max_queued_requests, s.timeout_seconds, s.max_queue_seconds
            )
            self.generator = Generator(
                self.bus,
                DEPLOYMENT,
                Words(),  # type: ignore[arg-type]
                self.admission,
                Observations("simulated"),
                Answers(None, DEPLOYMENT, 60),
                routers,
                s.timeout_seconds,
            )
            self.ready = True
            await shutdown.wait()
            self.draining = True
            await context.reporter.publish()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(s.grace_seconds):
                    while self.requests:
                        await asyncio.sleep(0.02)
            for task in self.requests:  # as uvicorn does
                task.cancel()
            await asyncio.gather(*self.requests, return_exceptions=True)
            await self.generator.close()

    def _status(self) -> Status:
        state: Any = "draining" if self.draining else "ready"
        return Status(service="gateway", instance=self.instance, deployment=DEPLOYMENT, state=state)


@dataclass
class Node:
    """One process of the fleet, and its successors: who is killed is started again, under another name."""

    kind: Kind
    index: int
    generation: int = 0
    process: Process | None = None
    service: Any = None
    task: asyncio.Task[None] | None = None
    shutdown: asyncio.Event = field(default_factory=asyncio.Event)
    busy: bool = False
    """Whether a fault of this node is under way; one at a time."""

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.index}-{self.generation}"

    @property
    def alive(self) -> bool:
        return self.process is not None and not self.process.dead and self.task is not None and not self.task.done()


@functools.cache
def _settings(kind: type[S]) -> S:
    """The defaults, whatever this machine's environment says; making them anew for each process takes long."""
    with mock.patch.dict(os.environ, clear=True):
        values: dict[str, Any] = {"model": Path("/simulated"), "grace_seconds": GRACE_SECONDS}
        return kind(**values)


def make_service(kind: Kind, instance: str, plan: Plan) -> Any:
    """A service as its process makes it, not yet running."""
    checkpoint: Any = SimpleNamespace(config=make_config(plan.moe_layers), deployment=lambda _name: DEPLOYMENT)
    if kind == "gateway":
        gateway = {"instance": instance, "max_concurrent_requests": plan.max_concurrent}
        return Gateway(_settings(GatewaySettings).model_copy(update=gateway))
    if kind == "router":
        router = {
            "instance": instance,
            "expert_shards": plan.shards,
            "batch_size": plan.batch_size,
            "prefill_chunk_tokens": plan.prefill_chunk_tokens,
            "kv_cache_mb": 1,
            "kv_block_tokens": plan.block_tokens,
            "degraded_mode": plan.degraded_mode,
        }
        return Router(_settings(RouterSettings).model_copy(update=router), checkpoint)
    expert = {"instance": instance, "expert_shards": plan.shards, "workers": plan.workers}
    return Worker(_settings(ExpertSettings).model_copy(update=expert), checkpoint)


@contextlib.contextmanager
def stand_ins(server: SimulatedServer) -> Iterator[None]:
    """While this is entered, services connect to `server`, and compute and load what is simulated."""
    connection = type("WorldConnection", (SimulatedConnection,), {"server": server})
    with contextlib.ExitStack() as stack:
        for module, name, value in (
            (bus_module, "Connection", connection),
            (status_module, "psutil", SimpleNamespace(Process=NoProcess)),
            (status_module, "memory", lambda: (2, 1)),
            (router_module, "Compute", SimulatedCompute),
            (router_module, "choose_model", lambda *_: SimulatedModel),
            (router_module, "DenseModel", SimulatedModel),
            (router_module, "Engine", SimulatedEngine),
            (router_module, "serve_metrics", _no_metrics),
            (router_module, "base_status", base_status),
            (engine_module, "forward", simulated_forward),
            (copies_module, "GRACE_SECONDS", COPIES_GRACE_SECONDS),
            (expert_module, "Compute", SimulatedCompute),
            (expert_module, "ExpertBank", SimulatedBank),
            (expert_module, "choose_options", lambda *_: None),
            (expert_module, "serve_metrics", _no_metrics),
            (expert_module, "base_status", base_status),
            (expert_module, "give_back_memory", lambda: None),
            (expert_module, "available_memory", lambda: 10**9),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        yield


def _no_metrics(_settings: object, _is_ready: object) -> tuple[str, Callable[[], None]]:
    return "host:0", lambda: None
