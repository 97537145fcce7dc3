"""The experts over NATS: one message per shard and layer, retried on a live replica, combined in shard order."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import structlog
import torch

from services.expert.messages import ExpertsReply, ExpertsRequest
from shared import subjects, wire
from shared.bus import BUDGET_MS, REQUEST_ID, Bus, Headers, NoRespondersError
from shared.checkpoint import ModelConfig
from shared.compute import Compute
from shared.errors import HTTP_STATUS, BadMessageError, MoeError
from shared.instrumentation import DISPATCH_RETRIES, DISPATCH_SECONDS
from shared.logs import request_id
from shared.tensors import WIRE_DTYPE, from_wire, to_wire

log = structlog.get_logger()

CALL_SECONDS = 10.0
"""How long one call may take before it is sent again."""
RETRY_PAUSE_SECONDS = 0.05
MOST_BROKEN_REPLIES = 3
"""So many of a shard's workers may fail at a call before it is given up: a bug of one must not end a request."""
RETRYABLE = {"overloaded", "draining", "bus_unavailable", "deadline_exceeded", "wrong_shard"}
MESSAGE_OVERHEAD_BYTES = 512
PAIR_BYTES = 12


@dataclass(frozen=True)
class Call:
    """One message: some rows of the batch, to one shard."""

    shard: int
    rows: torch.Tensor
    """[n] int64: rows of the batch."""
    data: bytes


class BusExperts:
    """Asks the workers of each shard. The deadline of a call includes waiting for a shard that has no worker."""

    def __init__(
        self,
        bus: Bus,
        compute: Compute,
        config: ModelConfig,
        deployment: str,
        *,
        num_shards: int,
        timeout_seconds: float,
        recovery_seconds: float,
    ) -> None:
        self._bus = bus
        self._compute = compute
        self._config = config
        self._num_shards = num_shards
        self._timeout_seconds = timeout_seconds
        self._recovery_seconds = recovery_seconds
        self._subjects = [subjects.experts(deployment, shard) for shard in range(num_shards)]
        self._seconds = {layer: DISPATCH_SECONDS.labels(str(layer)) for layer in config.moe_layers}
        self._retries = {reason: DISPATCH_RETRIES.labels(reason) for reason in (*HTTP_STATUS, "no_responders")}
        self._row = {layer: row for row, layer in enumerate(config.moe_layers)}
        self.tokens = torch.zeros(len(config.moe_layers), config.num_experts, dtype=torch.int64)
        """[L, E]: tokens sent to each expert since the start."""

    async def __call__(
        self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        start = time.perf_counter()
        calls = await self._compute(self._pack, layer, hidden, top_k_index, top_k_weights)
        if len(calls) == 1:
            replies = [await self._ask(calls[0])]
        else:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._guarded(call), name=f"experts:{call.shard}") for call in calls]
            replies = [_unwrap(task.result()) for task in tasks]
        try:
            out = await self._compute(self._combine, hidden, calls, replies)
        except BadMessageError as error:  # a worker's fault, not the client's
            raise MoeError("shard_unavailable", f"an expert worker's answer is no answer: {error.message}") from None
        self._seconds[layer].observe(time.perf_counter() - start)
        return out

    def _pack(
        self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> list[Call]:
        """The messages of one layer: pairs grouped by shard, rows split where the bus' limit asks for it."""
        hidden, top_k_index, top_k_weights = hidden.cpu(), top_k_index.cpu(), top_k_weights.cpu()
        tokens, k = top_k_index.shape
        experts = top_k_index.flatten()  # [P]
        self.tokens[self._row[layer]] += torch.bincount(experts, minlength=self._config.num_experts)
        token_of_pair = torch.arange(tokens).repeat_interleave(k)  # [P], ascending
        weights = top_k_weights.flatten()
        shard_of_pair = experts % self._num_shards
        row_bytes = hidden.shape[1] * hidden.element_size() + k * PAIR_BYTES
        most_rows = max(1, (self._bus.max_payload - MESSAGE_OVERHEAD_BYTES) // row_bytes)
        calls = []
        for shard in range(self._num_shards):
            pairs = (shard_of_pair == shard).nonzero().squeeze(1)
            if not pairs.numel():
                continue
            rows, local = torch.unique_consecutive(token_of_pair[pairs], return_inverse=True)
            for first in range(0, rows.shape[0], most_rows):
                chunk = rows[first : first + most_rows]
                inside = (local >= first) & (local < first + most_rows)
                chosen = pairs[inside]
                request = ExpertsRequest(
                    layer=layer,
                    hidden_states=to_wire(hidden[chunk]),
                    token_index=to_wire((local[inside] - first).int()),
                    expert_index=to_wire(experts[chosen].int()),
                    weights=to_wire(weights[chosen]),
                )
                calls.append(Call(shard, chunk, wire.encode(request)))
        return calls

    def _combine(self, hidden: torch.Tensor, calls: list[Call], replies: list[bytes]) -> torch.Tensor:
        """Add the partial sums in shard order, so that the sum does not depend on who answers first."""
        dtype = WIRE_DTYPE[hidden.dtype]
        out = torch.zeros(hidden.shape, dtype=torch.float32)
        for call, data in zip(calls, replies, strict=True):
            reply = wire.decode(ExpertsReply, data)
            shape = (call.rows.shape[0], hidden.shape[1])
            out.index_add_(0, call.rows, from_wire(reply.hidden_states, "hidden_states", shape, (dtype,)).float())
        return out.to(hidden.device, hidden.dtype)

    async def _guarded(self, call: Call) -> bytes | MoeError:
        """The answer or the error, as a value: one failing call must not leave its siblings' group in pieces."""
        try:
            return await self._ask(call)
        except MoeError as error:
            return error

    async def _ask(self, call: Call) -> bytes:
        now = time.monotonic()
        deadline = now + self._timeout_seconds
        nobody_since: float | None = None
        broken = 0
        while True:
            timeout = min(CALL_SECONDS, deadline - now)
            headers: Headers = {BUDGET_MS: f"{timeout * 1000:.0f}", REQUEST_ID: request_id.get()}
            try:
                return await self._bus.request(self._subjects[call.shard], call.data, timeout=timeout, headers=headers)
            except NoRespondersError:
                reason = "no_responders"
                now = time.monotonic()
                nobody_since = now if nobody_since is None else nobody_since
                if now - nobody_since >= self._recovery_seconds:
                    raise self._unavailable(call.shard, "no worker serves it") from None
            except MoeError as error:
                reason = error.code
                if reason not in RETRYABLE:
                    broken += 1
                    log.warning("experts.broken", shard=call.shard, code=reason, reason=error.message)
                    if broken >= MOST_BROKEN_REPLIES:
                        raise self._unavailable(call.shard, f"its workers cannot compute a call ({reason})") from None
                now = time.monotonic()
                nobody_since = None
            if now + RETRY_PAUSE_SECONDS >= deadline:
                raise self._unavailable(call.shard, f"its workers do not answer ({reason})")
            self._retries[reason].inc()
            await asyncio.sleep(RETRY_PAUSE_SECONDS)
            now = time.monotonic()

    def _unavailable(self, shard: int, why: str) -> MoeError:
        return MoeError("shard_unavailable", f"expert shard {shard} is unavailable: {why}; try again in a moment")


def _unwrap(result: bytes | MoeError) -> bytes:
    if isinstance(result, MoeError):
        raise result
    return result
