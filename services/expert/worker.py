"""An expert worker: loads its shards, answers for them, takes over shards that nobody serves."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import msgspec
import structlog
import torch
from nats.aio.msg import Msg

from services.expert.messages import ExpertsReply, ExpertsRequest
from services.expert.options import choose_options
from services.expert.placement import choose_shards, shards_to_take_over
from shared import subjects, wire
from shared.bus import REQUEST_ID, Bus, Served, deadline, raise_if_expired
from shared.checkpoint import Checkpoint
from shared.compute import Compute, give_back_memory, select_device, select_dtype, set_threads
from shared.errors import HTTP_STATUS, BadMessageError, MoeError
from shared.experts import ExpertBank, shard_experts
from shared.instrumentation import EXPERT_CALLS, EXPERT_ERRORS, EXPERT_SECONDS, SHARD_BYTES
from shared.logs import request_id, safe_request_id
from shared.service import base_status, instance_name, serve_metrics, service_context, until
from shared.settings import ExpertSettings
from shared.status import Fleet, Status
from shared.tensors import from_wire, to_wire

log = structlog.get_logger()

for _code in HTTP_STATUS:  # from the start, so that a dashboard shows zero and not nothing
    EXPERT_ERRORS.labels(_code)

FLOATS = ("float32", "bfloat16", "float16")
JOIN_SECONDS = 2.0
"""How long a starting worker waits for those that are expected to start with it."""
TAKEOVER_SECONDS = 3.0
"""How long a shard must have been without a worker before another takes it over."""


@dataclass
class _State:
    """What changes in this worker's report."""

    shards: tuple[int, ...] = ()
    wanted: tuple[int, ...] = ()
    ready: bool = False
    draining: bool = False
    loaded_bytes: int = 0
    total_bytes: int = 0
    calls: int = 0
    tokens: int = 0
    errors: int = 0


@dataclass(frozen=True)
class Work:
    """One call, checked."""

    layer: int
    hidden: torch.Tensor
    """[T, H] in any float dtype."""
    token_index: torch.Tensor
    """[P] int32"""
    expert_index: torch.Tensor
    """[P] int32"""
    weights: torch.Tensor
    """[P] float32"""


class Worker:
    """Holds the weights of some shards and answers calls for them."""

    def __init__(self, settings: ExpertSettings, checkpoint: Checkpoint) -> None:
        self._settings = settings
        self._checkpoint = checkpoint
        self._config = checkpoint.config
        self._layers = frozenset(checkpoint.config.moe_layers)
        self._deployment = checkpoint.deployment(settings.model_name)
        self._device = select_device(settings)
        self._dtype = select_dtype(settings, checkpoint.config)
        options = choose_options(settings, checkpoint.config, self._dtype, self._device)
        self._bank = ExpertBank(checkpoint, dtype=self._dtype, device=self._device, options=options)
        self._compute = Compute()
        self._loading = Compute()
        """A thread of its own: shards that are taken over load beside the answers for those already served."""
        self._state = _State()
        self._simulation = asyncio.Lock()
        self._instance = instance_name(settings, "expert")
        self._fleet = Fleet()
        self._served: list[Served] = []
        self._uncovered_since: dict[int, float] = {}
        self._deaf_until = 0.0
        self._address, self._stop_metrics = serve_metrics(
            settings, lambda: self._state.ready and not self._state.draining
        )
        self._base = base_status(settings, "expert", self._instance, self._address)
        self._owned: frozenset[int] = frozenset()
        self._noted: set[str] = set()

    async def run(self, shutdown: asyncio.Event) -> None:
        """Serve until `shutdown`, then finish what is in flight."""
        try:
            async with service_context(self._settings, "expert", self._instance, self._status) as context:
                self._reporter = context.reporter
                await self._fleet.watch(context.bus)
                await until(shutdown, self._live(context.bus))
                await self._drain(context.bus)
        finally:
            self._state.draining = True  # ends a load under way, which close() waits for
            self._loading.close()
            self._compute.close()
            self._stop_metrics()

    async def _live(self, bus: Bus) -> None:
        await self._reporter.publish()
        shards = self._settings.pinned_shards or await self._join()
        await self._take(bus, shards)
        subject = subjects.worker(self._deployment, self._instance)
        self._served.append(await bus.serve(subject, self._answerer(bus), capacity=self._settings.max_pending_calls))
        self._state.ready = True
        if self._settings.simulated_pair_ms is not None:
            log.warning("expert.simulated", pair_ms=self._settings.simulated_pair_ms)
        await bus.flush()
        await self._reporter.publish()
        log.info("expert.ready", instance=self._instance, deployment=self._deployment, shards=self._state.shards)
        while True:
            await asyncio.sleep(1)
            if not self._settings.pinned_shards:
                await self._take_over(bus)

    def _status(self) -> Status:
        s = self._state
        state = "draining" if s.draining else "ready" if s.ready else "loading" if s.wanted else "starting"
        cpu, memory = self._reporter.usage()
        return msgspec.structs.replace(
            self._base,
            deployment=self._deployment,
            state=state,
            num_shards=self._settings.expert_shards,
            shards=s.shards if s.ready else (),
            wanted_shards=s.wanted,
            pinned=bool(self._settings.pinned_shards),
            loaded_bytes=s.loaded_bytes,
            total_bytes=s.total_bytes,
            waiting=sum(served.queue.qsize() for served in self._served),
            requests_total=s.calls,
            tokens_total=s.tokens,
            errors_total=s.errors,
            cpu=cpu,
            memory_bytes=memory,
        )

    # -- placement ---------------------------------------------------------------------------------------------------

    def _workers(self) -> list[Status]:
        return [
            s
            for s in self._fleet.live("expert")
            if s.deployment == self._deployment and s.instance != self._instance and s.state != "draining"
        ]

    async def _join(self) -> tuple[int, ...]:
        """Wait for the workers that start together, then take this one's part."""
        deadline = time.monotonic() + JOIN_SECONDS
        while time.monotonic() < deadline and len(self._workers()) + 1 < self._settings.workers:
            await asyncio.sleep(0.05)
        return choose_shards(self._status(), self._workers(), self._settings.expert_shards, self._settings.workers)

    async def _take_over(self, bus: Bus) -> None:
        """Load shards that have been without a worker for a while and fall to this one."""
        now = time.monotonic()
        if not any(s.instance == self._instance for s in self._fleet.live("expert")):
            # Not even our own report comes back: we hear nobody, which says nothing about them.
            self._uncovered_since = {}
            self._deaf_until = now + TAKEOVER_SECONDS
        if now < self._deaf_until:
            return
        lost = shards_to_take_over(self._status(), self._workers(), self._settings.expert_shards)
        self._uncovered_since = {shard: self._uncovered_since.get(shard, now) for shard in lost}
        due = tuple(shard for shard, since in self._uncovered_since.items() if now - since >= TAKEOVER_SECONDS)
        if due:
            log.warning("expert.takeover", shards=due)
            await self._take(bus, due)
            self._reporter.touch()

    async def _take(self, bus: Bus, shards: tuple[int, ...]) -> None:
        """Load `shards`, warm them up, and subscribe to them."""
        self._state.wanted = tuple(sorted({*self._state.wanted, *shards}))
        num_experts, num_shards = self._config.num_experts, self._settings.expert_shards
        for shard in shards:
            self._state.total_bytes += self._bank.bytes_of(shard_experts(num_experts, num_shards, shard))
        await self._reporter.publish()
        for shard in shards:
            experts = shard_experts(num_experts, num_shards, shard)
            await self._loading(self._bank.load, experts, self._on_bytes)
            await self._loading(give_back_memory)
            for expert in experts:
                await self._compute(self._warm_up, expert)
            self._owned |= frozenset(experts)
            SHARD_BYTES.labels(str(shard)).set(self._bank.bytes_of(experts))
        for shard in shards:
            served = await bus.serve(
                subjects.experts(self._deployment, shard),
                self._answerer(bus, shard),
                queue_group=subjects.shard_queue(shard),
                capacity=self._settings.max_pending_calls,
            )
            self._served.append(served)
        self._state.wanted = tuple(s for s in self._state.wanted if s not in shards)
        self._state.shards = tuple(sorted({*self._state.shards, *shards}))

    def _on_bytes(self, count: int) -> None:
        if self._state.draining:
            raise MoeError("draining", "the worker is shutting down")
        self._state.loaded_bytes += count

    def _warm_up(self, expert: int) -> None:
        """First calls pay for kernels and pages; let them be ours."""
        hidden = torch.zeros(1, self._config.hidden_size, dtype=self._dtype, device=self._device)
        zero = torch.zeros(1, dtype=torch.int64, device=self._device)
        weights = torch.ones(1, device=self._device)
        for layer in self._config.moe_layers:
            self._bank.compute(layer, hidden, zero, zero + expert, weights)

    async def _drain(self, bus: Bus) -> None:
        self._state.draining = True
        await self._reporter.publish()
        try:
            async with asyncio.timeout(self._settings.grace_seconds):
                await asyncio.gather(*(served.stop_taking() for served in self._served))
                await bus.flush()
        except TimeoutError:
            log.warning("drain.cut_short", calls=sum(served.queue.qsize() for served in self._served))
        except MoeError as error:
            log.warning("drain.cut_short", reason=error.message)

    # -- answering ---------------------------------------------------------------------------------------------------

    def _answerer(self, bus: Bus, shard: int | None = None) -> Any:
        label = "any" if shard is None else str(shard)
        calls, seconds = EXPERT_CALLS.labels(label), EXPERT_SECONDS.labels(label)

        async def answer(message: Msg) -> None:
            self._note_requests((message.headers or {}).get(REQUEST_ID, ""))
            start = time.perf_counter()
            try:
                reply = await self._answer(message.data, deadline.get())
            except MoeError as error:
                self._state.errors += 1
                EXPERT_ERRORS.labels(error.code).inc()
                log.info("expert.refused", code=error.code, reason=error.message)
                raise
            seconds.observe(time.perf_counter() - start)
            calls.inc()
            self._state.calls += 1
            await bus.reply(message, reply)

        return answer

    def _note_requests(self, ids: str) -> None:
        """Say once per request that this worker serves it; while nothing changes, this is one comparison."""
        if ids == request_id.get():
            return
        request_id.set(ids)
        served = {i for i in map(safe_request_id, ids.split(",")) if i}
        for new in served - self._noted:
            log.info("request.served", request_id=new)
        self._noted = served

    async def _answer(self, data: bytes, expires: float | None) -> bytes:
        """One call: decode, check, compute, encode."""
        raise_if_expired(expires)
        work = self._checked(wire.decode(ExpertsRequest, data))
        if self._settings.simulated_pair_ms is None:
            out = await self._compute(self._run, work, expires, rows=work.hidden.shape[0])
        else:
            out = await self._simulated(work, self._settings.simulated_pair_ms / 1000)
        self._state.tokens += out.shape[0]
        return wire.encode(ExpertsReply(hidden_states=to_wire(out)))

    def _checked(self, request: ExpertsRequest) -> Work:
        """The call's tensors, if they fit together and this worker hosts the experts.

        Raises:
            BadMessageError: they do not fit.
            MoeError: `wrong_shard`.

        """
        c = self._config
        if request.layer not in self._layers:
            raise BadMessageError(f"layer {request.layer} has no experts")
        hidden = from_wire(request.hidden_states, "hidden_states", (None, c.hidden_size), FLOATS)
        token_index = from_wire(request.token_index, "token_index", (None,), ("int32",))
        pairs = token_index.shape[0]
        expert_index = from_wire(request.expert_index, "expert_index", (pairs,), ("int32",))
        weights = from_wire(request.weights, "weights", (pairs,), ("float32",))
        tokens = token_index.numpy()
        if pairs and (tokens.min() < 0 or tokens.max() >= hidden.shape[0]):
            raise BadMessageError(f"token_index is outside the {hidden.shape[0]} rows of hidden_states")
        for expert in set(expert_index.tolist()):
            if expert not in self._owned:
                raise MoeError("wrong_shard", f"expert {expert} is not hosted by {self._instance}")
        return Work(request.layer, hidden, token_index, expert_index, weights)

    async def _simulated(self, work: Work, pair_seconds: float) -> torch.Tensor:
        """Zeros [T, H], after the time that the products would take; one call at a time, as with real ones."""
        async with self._simulation:
            await asyncio.sleep(pair_seconds * work.expert_index.shape[0])
        return torch.zeros_like(work.hidden)

    def _run(self, work: Work, expires: float | None) -> torch.Tensor:
        """[T, H] in the call's dtype."""
        raise_if_expired(expires)
        device = self._device
        out = self._bank.compute(
            work.layer,
            work.hidden.to(device, self._dtype),
            work.token_index.to(device),
            work.expert_index.to(device),
            work.weights.to(device),
        )
        return out.to("cpu", work.hidden.dtype)


async def serve(settings: ExpertSettings, shutdown: asyncio.Event) -> None:
    """Run one worker until `shutdown`.

    Raises:
        StartError: a wrong checkpoint, a taken port, no NATS.

    """
    set_threads(settings)
    await Worker(settings, Checkpoint.open(settings.model)).run(shutdown)
