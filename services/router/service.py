"""The router as a service: takes generations and forward passes from the bus, runs the engine, reports."""

from __future__ import annotations

import asyncio
import contextlib
import time

import msgspec
import numpy as np
import structlog
import torch
from nats.aio.msg import Msg

from services.router.calls import Calls
from services.router.dispatch import BusExperts
from services.router.engine import Engine
from services.router.forward import moe_layer
from services.router.kv_cache import BlockPool, num_blocks
from services.router.messages import (
    CancelReply,
    CheckReply,
    CheckRequest,
    ForwardReply,
    ForwardRequest,
    GenerateChunk,
    GenerateRequest,
    decode_control,
)
from services.router.model import DenseModel, Routing
from services.router.options import choose_model
from services.router.scheduler import Scheduler
from services.router.sequence import Sequence
from shared import subjects, wire
from shared.bus import REQUEST_ID, Bus, Headers, Served, deadline, error_headers, raise_if_expired
from shared.checkpoint import Checkpoint
from shared.compute import Compute, keep_freed_memory, select_device, select_dtype, set_threads
from shared.errors import BadMessageError, MoeError, StartError
from shared.instrumentation import (
    EXPERT_TOKENS,
    KV_CACHE_USAGE,
    PROMPT_LENGTH,
    REQUESTS_RUNNING,
    REQUESTS_WAITING,
)
from shared.logs import request_id, safe_request_id
from shared.replicas import Replicas
from shared.service import base_status, instance_name, serve_metrics, service_context, until
from shared.settings import RouterSettings
from shared.status import Fleet, Status, StatusReporter
from shared.tensors import from_wire, to_wire

log = structlog.get_logger()

FORWARD_WORKERS = 16
CLIENT_SILENCE_SECONDS = 5.0
FLOATS = ("float32", "bfloat16", "float16")
MOST_STOP_TOKENS = 1024
"""All of them are looked through for each new token."""


class Router:
    """One router instance."""

    def __init__(self, settings: RouterSettings, checkpoint: Checkpoint) -> None:
        self._settings = settings
        self._checkpoint = checkpoint
        self._config = config = checkpoint.config
        self._deployment = checkpoint.deployment(settings.model_name)
        self._device = select_device(settings)
        self._dtype = select_dtype(settings, config)
        self._compute = Compute()
        self._instance = instance_name(settings, "router")
        self._workers = Replicas("expert", self._deployment)
        self._fleet = Fleet(CLIENT_SILENCE_SECONDS, tell=self._workers.observe)
        self._known_clients: set[str] = set()
        self._served: list[Served] = []
        self._replies: dict[str, str] = {}
        self._state: str = "starting"
        self._loaded_bytes = 0
        self._total_bytes = DenseModel.load_bytes(checkpoint, self._dtype.itemsize)
        self._model_class = choose_model(settings, config, self._dtype, self._device)
        size = self._model_class.block_bytes(config, settings.kv_block_tokens, self._dtype, self._device)
        blocks = num_blocks(settings.kv_cache_mb, size)
        capacity = blocks * settings.kv_block_tokens - 1
        wanted = min(settings.max_model_len or config.context_length, config.context_length)
        if capacity < 1 or (settings.max_model_len and capacity < wanted):
            raise StartError(
                f"KV_CACHE_MB={settings.kv_cache_mb} holds {max(capacity, 0)} tokens, "
                f"MAX_MODEL_LEN asks for {wanted}; raise the one or lower the other"
            )
        self.max_model_len = min(wanted, capacity)
        self._blocks = blocks
        self._address, self._stop_metrics = serve_metrics(settings, lambda: self._state == "ready")
        self._base = base_status(settings, "router", self._instance, self._address)
        self._engine: Engine | None = None
        self._experts: BusExperts | None = None
        self._model: DenseModel | None = None
        self._expert_metrics = [
            [EXPERT_TOKENS.labels(str(layer), str(e)) for e in range(config.num_experts)] for layer in config.moe_layers
        ]
        name = settings.model_name
        self._gauges = [gauge.labels(name) for gauge in (REQUESTS_RUNNING, REQUESTS_WAITING, KV_CACHE_USAGE)]
        self._listening_since = time.monotonic()
        self._exported = np.zeros((len(config.moe_layers), config.num_experts), dtype=np.int64)

    async def run(self, shutdown: asyncio.Event) -> None:
        """Serve until `shutdown`, then finish the generations in flight."""
        try:
            async with service_context(self._settings, "router", self._instance, self._status) as context:
                self._reporter: StatusReporter = context.reporter
                await self._fleet.watch(context.bus)
                await until(shutdown, self._live(context.bus))
                await self._drain(context.bus)
        finally:
            self._state = "draining"  # ends a load under way, which close() waits for
            self._compute.close()
            self._stop_metrics()

    async def _live(self, bus: Bus) -> None:
        s, config = self._settings, self._config
        self._state = "loading"
        self._bus = bus
        load = self._model_class.load
        self._model = await self._compute(load, self._checkpoint, self._dtype, self._device, self._on_bytes)
        await self._compute(self._model.allocate_cache, self._blocks, s.kv_block_tokens)
        calls = Calls(
            bus,
            self._deployment,
            self._workers,
            num_shards=s.expert_shards,
            timeout_seconds=s.timeout_seconds,
            recovery_seconds=s.expert_recovery_seconds,
        )
        self._experts = BusExperts(bus, config, calls, num_shards=s.expert_shards, degraded_mode=s.degraded_mode)
        scheduler = Scheduler(
            BlockPool(self._blocks, s.kv_block_tokens),
            batch_size=s.batch_size,
            prefill_chunk_tokens=s.prefill_chunk_tokens,
            max_waiting=s.max_waiting,
        )
        self._engine = Engine(
            self._model, self._experts, self._compute, scheduler, self._deliver, model_name=s.model_name
        )
        self._engine_task = asyncio.create_task(self._engine.run(), name="engine")
        house = asyncio.create_task(self._keep_house(self._engine, self._experts), name="housekeeping")
        try:
            await bus.serve(subjects.control("router", self._instance), self._on_control, capacity=1024)
            name = self._instance
            for subject, group, handler, workers in (
                (subjects.generate(self._deployment), subjects.ROUTER_QUEUE, self._on_generate, 1),
                (subjects.generate(self._deployment, name), "", self._on_generate, 1),
                (subjects.forward(self._deployment), subjects.ROUTER_QUEUE, self._on_forward, FORWARD_WORKERS),
                (subjects.forward(self._deployment, name), "", self._on_forward, FORWARD_WORKERS),
            ):
                self._served.append(
                    await bus.serve(subject, handler, queue_group=group, capacity=s.max_waiting, workers=workers)
                )
            with contextlib.suppress(MoeError):  # disconnected: the subscriptions and the report follow the reconnect
                await bus.flush()
            self._state = "ready"
            await self._reporter.publish()
            log.info("router.ready", instance=self._instance, deployment=self._deployment, kv_blocks=self._blocks)
            await asyncio.shield(self._engine_task)  # on cancellation it must go on: _drain waits for its generations
        except asyncio.CancelledError:
            await self._drain(bus)
            raise
        finally:
            for task in (self._engine_task, house):
                task.cancel()
            await asyncio.gather(self._engine_task, house, return_exceptions=True)

    async def _drain(self, bus: Bus) -> None:
        """Withdraw readiness, take nothing new, let the generations in flight finish."""
        if self._state == "draining":
            return
        self._state = "draining"
        await self._reporter.publish()
        try:
            async with asyncio.timeout(self._settings.grace_seconds):
                for served in self._served:
                    await served.stop_taking()
                while self._engine is not None and self._engine.sequences() and not self._engine_task.done():
                    await asyncio.sleep(0.02)
                await bus.flush()
        except MoeError as error:
            log.warning("drain.cut_short", reason=error.message)
        except TimeoutError:
            log.warning("drain.cut_short", generations=len(self._engine.sequences()) if self._engine else 0)
            for sequence in self._engine.sequences() if self._engine else []:
                await self._deliver(sequence, MoeError("draining", "the router is shutting down"))

    def _on_bytes(self, count: int) -> None:
        if self._state == "draining":
            raise MoeError("draining", "the router is shutting down")
        self._loaded_bytes += count

    def _status(self) -> Status:
        engine = self._engine
        return msgspec.structs.replace(
            self._reporter.with_usage(self._base),
            deployment=self._deployment,
            state=self._state,
            num_shards=self._settings.expert_shards,
            loaded_bytes=self._loaded_bytes,
            total_bytes=self._total_bytes,
            running=engine.running if engine else 0,
            waiting=engine.waiting if engine else 0,
            max_model_len=self.max_model_len,
            kv_usage=engine.pool.usage if engine else 0.0,
            tokens_total=engine.tokens if engine else 0,
            requests_total=engine.finished if engine else 0,
            errors_total=engine.failed if engine else 0,
            errors=engine.errors if engine else {},
            latencies=engine.latencies() if engine else {},
            queue_limit=self._settings.max_waiting,
            cores=float(torch.get_num_threads()),
            expert_tokens=tuple(tuple(row) for row in self._experts.tokens.tolist()) if self._experts else (),
        )

    async def _keep_house(self, engine: Engine, experts: BusExperts) -> None:
        """Once a second: gauges, expert tokens, and clients that have fallen silent."""
        while True:
            try:
                self._export(engine, experts)
                self._cancel_silent(engine, time.monotonic())
            except Exception:  # a figure that cannot be exported must not end the ones after it
                log.exception("housekeeping.failed")
            await asyncio.sleep(1)

    def _export(self, engine: Engine, experts: BusExperts) -> None:
        self._gauges[0].set(engine.running)
        self._gauges[1].set(engine.waiting)
        self._gauges[2].set(engine.pool.usage)
        now = experts.tokens.copy()
        for metrics, row in zip(self._expert_metrics, (now - self._exported).tolist(), strict=True):
            for metric, tokens in zip(metrics, row, strict=True):
                if tokens:
                    metric.inc(tokens)
        self._exported = now

    def _cancel_silent(self, engine: Engine, now: float) -> None:
        """Cancel the generations of gateways that were heard of once and then fell silent while we were listening."""
        if not self._bus.connected:
            self._listening_since = now
        live = {status.instance for status in self._fleet.live("gateway")}
        sequences = engine.sequences()
        self._known_clients = live | (self._known_clients & {s.request.client for s in sequences})
        if now - self._listening_since < CLIENT_SILENCE_SECONDS:
            return
        for sequence in sequences:
            client = sequence.request.client
            if client in self._known_clients and client not in live:
                log.warning("client.silent", client=client, id=sequence.request.id, request_id=sequence.request_id)
                engine.cancel(sequence.request.id)

    # -- from the bus ------------------------------------------------------------------------------------------------

    async def _on_generate(self, message: Msg) -> None:
        request = wire.decode(GenerateRequest, message.data)
        if not message.reply:
            raise BadMessageError("a generate request needs a reply subject")
        self._check(request)
        headers = message.headers or {}
        now = time.monotonic()
        sequence = Sequence(
            request,
            arrival=now,
            deadline=None if request.output_ids else deadline.get(),  # it has waited its turn already
            eos_token_ids=frozenset(self._config.eos_token_ids),
            request_id=safe_request_id(headers.get(REQUEST_ID, request.id)),
        )
        assert self._engine is not None  # noqa: S101 - subscribed only after the engine is there
        self._engine.submit(sequence)
        self._replies[request.id] = message.reply
        PROMPT_LENGTH.labels(self._settings.model_name).observe(sequence.prompt_length)
        log.info(
            "generation.accepted", request_id=sequence.request_id, id=request.id, prompt_tokens=sequence.prompt_length
        )
        try:
            await self._bus.publish(message.reply, wire.encode(GenerateChunk(id=request.id, instance=self._instance)))
        except MoeError:  # nobody knows that it is here, so nobody would cancel it
            del self._replies[request.id]
            self._engine.cancel(request.id)
            raise

    def _check(self, request: GenerateRequest) -> None:
        vocab, length = self._config.vocab_size, len(request.token_ids)
        if max(request.token_ids) >= vocab or max(request.output_ids, default=0) >= vocab:
            raise MoeError("invalid_request", f"token ids must be below {vocab}", param="prompt")
        if request.output_ids and len(request.output_ids) >= request.max_tokens:
            raise MoeError("invalid_request", "output_ids leave no token of max_tokens to be made", param="output_ids")
        if len(request.stop_token_ids) > MOST_STOP_TOKENS:
            message = f"stop_token_ids: {len(request.stop_token_ids)} are more than {MOST_STOP_TOKENS}"
            raise MoeError("invalid_request", message, param="stop_token_ids")
        if any(not 0 <= token < vocab for token in request.sampling.logit_bias):
            raise MoeError("invalid_request", f"logit_bias: token ids must be in [0, {vocab})", param="logit_bias")
        if length + request.max_tokens > self.max_model_len:
            raise MoeError(
                "context_length_exceeded",
                f"{length} prompt tokens and {request.max_tokens} new ones exceed the {self.max_model_len} "
                "tokens that this model can hold",
                param="max_tokens",
            )

    async def _on_control(self, message: Msg) -> None:
        request = decode_control(message.data)
        assert self._engine is not None  # noqa: S101 - subscribed only after the engine is there
        if isinstance(request, CheckRequest):
            reply = wire.encode(CheckReply(tokens=self._engine.told(request.ids)))
        else:
            reply = wire.encode(CancelReply(found=self._engine.cancel(request.id)))
        await self._bus.reply(message, reply)

    async def _on_forward(self, message: Msg) -> None:
        request = wire.decode(ForwardRequest, message.data)
        if request.layer not in self._config.moe_layers:
            raise MoeError("invalid_request", f"layer {request.layer} is not one of the MoE layers", param="layer")
        headers = message.headers or {}
        request_id.set(safe_request_id(headers.get(REQUEST_ID, "")))
        assert self._model is not None  # noqa: S101 - subscribed only after the model is there
        assert self._experts is not None  # noqa: S101
        routing = await self._compute(self._forward_input, self._model, request, deadline.get())
        out, degraded = await moe_layer(self._model, self._experts, self._compute, request.layer, routing)
        reply = ForwardReply(
            hidden_states=to_wire(out.float()),
            top_k_index=to_wire(routing.top_k_index),
            top_k_weights=to_wire(routing.top_k_weights),
            degraded=degraded,
        )
        await self._bus.reply(message, wire.encode(reply))

    def _forward_input(self, model: DenseModel, request: ForwardRequest, expires: float | None) -> Routing:
        """In the compute thread, behind a step of the engine perhaps: check the rows and choose their experts."""
        raise_if_expired(expires)
        hidden = from_wire(request.hidden_states, "hidden_states", (None, self._config.hidden_size), FLOATS)
        if not hidden.shape[0]:
            raise MoeError("invalid_request", "hidden_states has no rows", param="hidden_states")
        if not torch.isfinite(hidden).all():
            raise MoeError("invalid_request", "hidden_states has NaN or infinite values", param="hidden_states")
        return model.gate(request.layer, hidden.to(self._device, self._dtype))

    async def _deliver(self, sequence: Sequence, chunk: GenerateChunk | MoeError) -> None:
        """The engine's sink: publish one chunk, or the error that ends the generation."""
        reply = self._replies.get(sequence.request.id)
        if reply is None:
            return
        headers: Headers | None = None
        data = b""
        last = isinstance(chunk, MoeError) or chunk.finish_reason is not None
        if isinstance(chunk, MoeError):
            headers = error_headers(chunk)
        else:
            data = wire.encode(chunk)
        if last:
            del self._replies[sequence.request.id]
        try:
            await self._bus.publish(reply, data, headers=headers)
        except MoeError as error:
            log.warning("chunk.lost", request_id=sequence.request_id, code=error.code, reason=error.message)
            if error.code == "payload_too_large":
                with contextlib.suppress(MoeError):  # the connection went just now: nobody is there to be told
                    await self._bus.publish(reply, b"", headers=error_headers(error))
            if not last:
                self._replies.pop(sequence.request.id, None)
                if self._engine is not None:
                    self._engine.cancel(sequence.request.id)


async def serve(settings: RouterSettings, shutdown: asyncio.Event) -> None:
    """Run one router until `shutdown`.

    Raises:
        StartError: a wrong checkpoint, a taken port, no NATS, a KV budget too small.

    """
    set_threads(settings)
    keep_freed_memory()
    await Router(settings, Checkpoint.open(settings.model)).run(shutdown)
