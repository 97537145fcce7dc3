"""An expert worker: loads its shards, answers for them, takes over shards that nobody serves."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import structlog
import torch
from nats.aio.msg import Msg

from services.expert.copies import Copies, Key
from services.expert.messages import ExpertsReply, ExpertsRequest
from services.expert.options import choose_options
from services.expert.placement import choose_shards, shards_to_hand_over
from services.expert.watch import Loss, Watch
from services.monitor.messages import Event, ExpertPlan
from shared import subjects, wire
from shared.bus import REQUEST_ID, Bus, NoRespondersError, Served, deadline, raise_if_expired
from shared.checkpoint import Checkpoint
from shared.compute import Compute, give_back_memory, select_device, select_dtype, set_threads
from shared.errors import HTTP_STATUS, BadMessageError, MoeError
from shared.experts import ExpertBank, shard_experts
from shared.histogram import Histogram
from shared.instrumentation import (
    BAD_MESSAGES,
    COPY_BYTES,
    EXPERT_CALLS,
    EXPERT_ERRORS,
    EXPERT_SECONDS,
    SHARD_BYTES,
    TAKEOVER_SECONDS,
)
from shared.logs import request_id, safe_request_id
from shared.memory import available_memory
from shared.service import base_status, instance_name, serve_metrics, service_context, until
from shared.settings import ExpertSettings
from shared.status import Fleet, Status, StatusReporter
from shared.tensors import from_wire, to_wire

log = structlog.get_logger()

for _code in HTTP_STATUS:  # from the start, so that a dashboard shows zero and not nothing
    EXPERT_ERRORS.labels(_code)

FLOATS = ("float32", "bfloat16", "float16")
JOIN_SECONDS = 2.0
"""How long a starting worker waits for those that are expected to start with it."""
LOOK_SECONDS = 0.1
"""How often a worker looks whether another is lost."""
PROBE_SECONDS = 2.0
"""How long an answer to a probe is waited for; who is late lives."""
COPY_PAUSE_SECONDS = 5.0
"""After a copy could not be loaded."""
COPY_MEMORY_SECONDS = 30.0
"""After there was no memory for them."""
COPIES_SHARE_OF_MEMORY = 0.8
"""Of what is left: the most that copies may take, which are a luxury."""
HAND_OVER_SHARE = 0.7
"""Of GRACE_SECONDS: how long a worker that drains waits for another to take its shards over."""


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
    busy_seconds: float = 0.0
    codes: dict[str, int] = field(default_factory=dict)
    """Errors by code."""


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
    shard: int
    """The home of its first expert."""


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
        self._seconds = Histogram()
        self._simulation = asyncio.Lock()
        self._metrics = [
            (EXPERT_CALLS.labels(str(shard)), EXPERT_SECONDS.labels(str(shard)))
            for shard in range(settings.expert_shards)
        ]
        self._instance = instance_name(settings, "expert")
        self._fleet = Fleet()
        self._watch = Watch(self._instance)
        self._probes: set[asyncio.Task[None]] = set()
        self._served: list[Served] = []
        self._address, self._stop_metrics = serve_metrics(
            settings, lambda: self._state.ready and not self._state.draining
        )
        self._base = base_status(settings, "expert", self._instance, self._address)
        self._owned: frozenset[int] = frozenset()
        self._copies = Copies(self._config.moe_layers, self._config.num_experts, settings.expert_shards)
        self._placing = asyncio.Lock()
        """Held by whoever loads or drops, so that nothing is dropped that another counts on."""
        self._noted: set[str] = set()

    async def run(self, shutdown: asyncio.Event) -> None:
        """Serve until `shutdown`, then finish what is in flight."""
        try:
            async with service_context(self._settings, "expert", self._instance, self._status) as context:
                self._reporter: StatusReporter = context.reporter
                await self._fleet.watch(context.bus)
                await context.bus.watch(subjects.plan(self._deployment), self._on_plan)
                watching = asyncio.create_task(self._keep_watch(context.bus), name="watch")
                copying = asyncio.create_task(self._keep_copies(), name="copies")
                try:
                    await until(shutdown, self._live(context.bus))
                    await self._drain(context.bus)
                finally:
                    tasks = [watching, copying, *self._probes]
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)
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
        with contextlib.suppress(MoeError):  # disconnected: the subscriptions and the report follow the reconnect
            await bus.flush()
        await self._reporter.publish()
        log.info("expert.ready", instance=self._instance, deployment=self._deployment, shards=self._state.shards)
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if not self._settings.pinned_shards:
                await self._take_over(bus)

    def _placed(self) -> Status:
        """The report without its figures: what placement looks at."""
        s = self._state
        return msgspec.structs.replace(
            self._base,
            deployment=self._deployment,
            state="draining" if s.draining else "ready" if s.ready else "loading" if s.wanted else "starting",
            num_shards=self._settings.expert_shards,
            shards=s.shards if s.ready else (),
            wanted_shards=s.wanted,
            pinned=bool(self._settings.pinned_shards),
        )

    def _status(self) -> Status:
        s = self._state
        return msgspec.structs.replace(
            self._reporter.with_usage(self._placed()),
            loaded_bytes=s.loaded_bytes,
            total_bytes=s.total_bytes,
            waiting=sum(served.queue.qsize() for served in self._served),
            requests_total=s.calls,
            tokens_total=s.tokens,
            errors_total=s.errors,
            errors=s.codes,
            latencies={"compute": self._seconds.counts()},
            queue_limit=self._settings.max_pending_calls * len(self._served),
            cores=float(torch.get_num_threads()),
            epoch=self._copies.epoch(s.shards),
            busy_seconds=s.busy_seconds,
        )

    # -- placement ---------------------------------------------------------------------------------------------------

    async def _keep_watch(self, bus: Bus) -> None:
        """Look at the other workers, and ask those that should have been heard of."""
        while True:
            try:
                self._look(bus)
            except Exception:  # one look that goes wrong must not be the last
                log.exception("watch.failed")
            await asyncio.sleep(LOOK_SECONDS)

    def _look(self, bus: Bus) -> None:
        reports = [(heard, s) for heard, s in self._fleet.heard("expert") if s.deployment == self._deployment]
        for instance in self._watch.look(time.monotonic(), reports, connection=bus.connection):
            task = asyncio.create_task(self._probe(bus, instance), name=f"probe:{instance}")
            self._probes.add(task)
            task.add_done_callback(self._probes.discard)

    async def _probe(self, bus: Bus, instance: str) -> None:
        try:
            await bus.request(subjects.discovery("PING", "expert", instance), b"", timeout=PROBE_SECONDS)
        except NoRespondersError:
            self._watch.absent(instance)
        except MoeError:
            self._watch.unanswered(instance)
        else:
            self._watch.answered(instance, time.monotonic())

    def _needed(self) -> bool:
        """Whether a router asks for experts."""
        return any(s.deployment == self._deployment and s.state == "ready" for s in self._fleet.live("router"))

    async def _join(self) -> tuple[int, ...]:
        """Wait for the workers that start together, then take this one's part."""
        deadline = time.monotonic() + JOIN_SECONDS
        while time.monotonic() < deadline and len(self._watch.workers()) + 1 < self._settings.workers:
            await asyncio.sleep(0.05)
        return choose_shards(
            self._status(), self._watch.workers(), self._settings.expert_shards, self._settings.workers
        )

    async def _take_over(self, bus: Bus) -> None:
        """Load the shards that are lost and fall to this worker."""
        start = time.monotonic()
        losses = self._watch.losses(self._placed(), self._settings.expert_shards, start, needed=self._needed())
        if not losses:
            return
        shards = tuple(loss.shard for loss in losses)
        for loss in losses:
            log.warning(
                "expert.takeover",
                shard=loss.shard,
                lost=loss.instance,
                reason=loss.reason,
                seconds_since_last_sign=round(start - loss.sign, 3),
            )
        await self._take(bus, shards)
        with contextlib.suppress(MoeError):  # disconnected: the subscriptions and the report follow the reconnect
            await bus.flush()
        now = time.monotonic()
        log.info("expert.taken_over", shards=shards, load_seconds=round(now - start, 3))
        for loss in losses:  # before the report, by which the monitor ends its alert: events tell it in that order
            TAKEOVER_SECONDS.labels(loss.reason).observe(now - loss.sign)
            await self._tell(bus, loss, now - loss.sign)
        await self._reporter.publish()

    async def _tell(self, bus: Bus, loss: Loss, seconds: float) -> None:
        lost = f"{loss.instance} ({loss.reason})" if loss.instance else "nobody"
        text = (
            f"{self._instance} took shard {loss.shard} over from {lost}; it serves {seconds:.1f} s after its last sign"
        )
        event = Event(kind="takeover", subject=f"{self._deployment}/{loss.shard}", text=text, time=time.time())
        try:
            await bus.publish(subjects.event("takeover"), wire.encode(event))
        except MoeError as error:
            log.info("takeover.unpublished", reason=error.message)

    async def _take(self, bus: Bus, shards: tuple[int, ...]) -> None:
        """Load `shards`, warm them up, and subscribe to them."""
        async with self._placing:
            await self._load_and_serve(bus, shards)

    async def _load_and_serve(self, bus: Bus, shards: tuple[int, ...]) -> None:
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
                self._answerer(bus),
                queue_group=subjects.shard_queue(shard),
                capacity=self._settings.max_pending_calls,
            )
            self._served.append(served)
        self._state.wanted = tuple(s for s in self._state.wanted if s not in shards)
        self._state.shards = tuple(sorted({*self._state.shards, *shards}))
        own = frozenset(key for key in self._copies.held if key[1] in self._owned)
        self._copies.held -= own  # which are ours now, and stay
        self._state.total_bytes -= self._bytes_of_copies(own)

    # -- copies of other shards' experts -----------------------------------------------------------------------------

    def _on_plan(self, message: Msg) -> None:
        try:
            plan = wire.decode(ExpertPlan, message.data)
        except BadMessageError:
            BAD_MESSAGES.labels("plan").inc()
            return
        if self._copies.tell(plan):
            log.info("plan.heard", epoch=plan.epoch, to_load=len(self._copies.missing(self._state.shards)))

    async def _keep_copies(self) -> None:
        """Load what the plan adds to this worker's shards, and drop what nobody needs any more."""
        while not self._state.draining:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                if self._state.ready:
                    await self._load_copies()
                    await self._drop_copies()
            except MemoryError as error:
                log.warning("copies.refused", reason=str(error))
                await asyncio.sleep(COPY_MEMORY_SECONDS)
            except Exception:  # home copies serve meanwhile
                if not self._state.draining:
                    log.exception("copies.failed")
                    await asyncio.sleep(COPY_PAUSE_SECONDS)

    async def _load_copies(self) -> None:
        """Layer by layer, so that a shard that is to be taken over need not wait for all."""
        start, count = time.monotonic(), 0
        while not self._state.draining:
            async with self._placing:
                missing = self._copies.missing(self._state.shards)
                if not missing:
                    break
                self._check_memory(frozenset(missing))
                layer = missing[0][0]
                experts = [e for each, e in missing if each == layer]
                keys = frozenset((layer, e) for e in experts)
                self._state.total_bytes += self._bytes_of_copies(keys)
                try:
                    await self._loading(self._bank.load, experts, self._on_bytes, (layer,))
                    for expert in experts:
                        await self._compute(self._warm_up, expert, (layer,))
                except BaseException:
                    self._state.total_bytes -= self._bytes_of_copies(keys)
                    raise
                self._copies.held |= keys
                count += len(keys)
        if count:
            COPY_BYTES.set(self._bytes_of_copies(self._copies.held))
            epoch = self._copies.epoch(self._state.shards)
            log.info("copies.loaded", epoch=epoch, copies=count, seconds=round(time.monotonic() - start, 3))
            await self._reporter.publish()

    def _check_memory(self, keys: frozenset[Key]) -> None:
        """See that there is memory for copies.

        Raises:
            MemoryError: there is not.

        """
        needed, available = self._bytes_of_copies(keys), available_memory()
        if needed > COPIES_SHARE_OF_MEMORY * available:
            raise MemoryError(
                f"{len(keys)} copies take {needed / 1e9:.2f} GB, and {available / 1e9:.2f} GB of memory are left; "
                "lower REBALANCE_EXTRA_EXPERTS, or give the worker more"
            )

    async def _drop_copies(self) -> None:
        routers = [s for s in self._fleet.live("router") if s.deployment == self._deployment and s.state == "ready"]
        if not self._copies.spare(self._state.shards, routers, time.monotonic()):
            return
        async with self._placing:
            spare = self._copies.spare(self._state.shards, routers, time.monotonic())
            self._copies.held -= spare  # from here on calls for them are refused, and those before are computed first
            await self._compute(self._bank.drop, spare)
            self._state.total_bytes -= self._bytes_of_copies(spare)
            self._state.loaded_bytes -= self._bytes_of_copies(spare)
            await self._loading(give_back_memory)
        COPY_BYTES.set(self._bytes_of_copies(self._copies.held))
        log.info("copies.dropped", copies=len(spare))

    def _bytes_of_copies(self, keys: frozenset[Key]) -> int:
        return self._bank.bytes_of((expert for _, expert in keys), num_layers=1) if keys else 0

    def _on_bytes(self, count: int) -> None:
        if self._state.draining:
            raise MoeError("draining", "the worker is shutting down")
        self._state.loaded_bytes += count

    def _warm_up(self, expert: int, layers: Sequence[int] | None = None) -> None:
        """First calls pay for kernels and pages; let them be ours."""
        hidden = torch.zeros(1, self._config.hidden_size, dtype=self._dtype, device=self._device)
        zero = torch.zeros(1, dtype=torch.int64, device=self._device)
        weights = torch.ones(1, device=self._device)
        for layer in self._config.moe_layers if layers is None else layers:
            self._bank.compute(layer, hidden, zero, zero + expert, weights)

    async def _drain(self, bus: Bus) -> None:
        self._state.draining = True
        await self._reporter.publish()
        try:
            async with asyncio.timeout(self._settings.grace_seconds):
                await self._hand_over()
                await asyncio.gather(*(served.stop_taking() for served in self._served))
                await bus.flush()
        except TimeoutError:
            log.warning("drain.cut_short", calls=sum(served.queue.qsize() for served in self._served))
        except MoeError as error:
            log.warning("drain.cut_short", reason=error.message)

    async def _hand_over(self) -> None:
        """Keep answering, for a part of the grace, while another worker loads what this one alone serves."""
        start = time.monotonic()
        give_up = start + HAND_OVER_SHARE * self._settings.grace_seconds
        while self._needed() and (left := shards_to_hand_over(self._placed(), self._watch.workers())):
            if time.monotonic() >= give_up:
                log.warning("expert.not_handed_over", shards=left)
                return
            await asyncio.sleep(LOOK_SECONDS)

    # -- answering ---------------------------------------------------------------------------------------------------

    def _answerer(self, bus: Bus) -> Any:
        async def answer(message: Msg) -> None:
            self._note_requests((message.headers or {}).get(REQUEST_ID, ""))
            start = time.perf_counter()
            try:
                shard, reply = await self._answer(message.data, deadline.get())
            except MoeError as error:
                self._state.errors += 1
                self._state.codes[error.code] = self._state.codes.get(error.code, 0) + 1
                EXPERT_ERRORS.labels(error.code).inc()
                log.info("expert.refused", code=error.code, reason=error.message)
                raise
            taken = time.perf_counter() - start
            self._seconds.observe(taken)
            calls, seconds = self._metrics[shard]
            seconds.observe(taken)
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

    async def _answer(self, data: bytes, expires: float | None) -> tuple[int, bytes]:
        """One call: decode, check, compute, encode; with the shard that it counts for."""
        raise_if_expired(expires)
        work = self._checked(wire.decode(ExpertsRequest, data))
        if self._settings.simulated_pair_ms is None:
            out, seconds = await self._compute(self._run, work, expires, rows=work.hidden.shape[0])
        else:
            out, seconds = await self._simulated(work, self._settings.simulated_pair_ms / 1000)
        self._state.busy_seconds += seconds
        self._state.tokens += out.shape[0]
        return work.shard, wire.encode(ExpertsReply(hidden_states=to_wire(out)))

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
        if pairs > hidden.shape[0] * c.num_experts_per_tok:
            raise BadMessageError(f"{pairs} pairs are more than {c.num_experts_per_tok} for each of the rows")
        tokens = token_index.numpy()
        if pairs and (tokens.min() < 0 or tokens.max() >= hidden.shape[0]):
            raise BadMessageError(f"token_index is outside the {hidden.shape[0]} rows of hidden_states")
        experts = expert_index.tolist()
        for expert in set(experts):
            if expert not in self._owned and (request.layer, expert) not in self._copies.held:
                raise MoeError("wrong_shard", f"expert {expert} is not hosted by {self._instance}")
        shard = experts[0] % self._settings.expert_shards if experts else 0
        return Work(request.layer, hidden, token_index, expert_index, weights, shard)

    async def _simulated(self, work: Work, pair_seconds: float) -> tuple[torch.Tensor, float]:
        """Zeros [T, H], and the time that the products would take, after it; one call at a time, as with real ones."""
        seconds = pair_seconds * work.expert_index.shape[0]
        async with self._simulation:
            await asyncio.sleep(seconds)
        return torch.zeros_like(work.hidden), seconds

    def _run(self, work: Work, expires: float | None) -> tuple[torch.Tensor, float]:
        """[T, H] in the call's dtype, and the seconds that it took."""
        raise_if_expired(expires)
        start = time.perf_counter()
        device = self._device
        out = self._bank.compute(
            work.layer,
            work.hidden.to(device, self._dtype),
            work.token_index.to(device),
            work.expert_index.to(device),
            work.weights.to(device),
        )
        return out.to("cpu", work.hidden.dtype), time.perf_counter() - start


async def serve(settings: ExpertSettings, shutdown: asyncio.Event) -> None:
    """Run one worker until `shutdown`.

    Raises:
        StartError: a wrong checkpoint, a taken port, no NATS.

    """
    set_threads(settings)
    await Worker(settings, Checkpoint.open(settings.model)).run(shutdown)
