"""The experts over NATS: one message per shard and layer, retried on a live replica, combined in shard order."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import structlog
import torch

from services.expert.messages import ExpertsReply, ExpertsRequest
from shared import subjects, wire
from shared.bus import BUDGET_MS, REQUEST_ID, Bus, Headers, NoRespondersError
from shared.checkpoint import ModelConfig
from shared.errors import HTTP_STATUS, BadMessageError, MoeError
from shared.instrumentation import DISPATCH_RETRIES, DISPATCH_SECONDS
from shared.logs import request_id
from shared.tensors import WIRE_DTYPE, check

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
    rows: npt.NDArray[np.int64]
    """[n]: rows of the batch, ascending."""
    data: bytes


class BusExperts:
    """Asks the workers of each shard. The deadline of a call includes waiting for a shard that has no worker."""

    def __init__(
        self,
        bus: Bus,
        config: ModelConfig,
        deployment: str,
        *,
        num_shards: int,
        timeout_seconds: float,
        recovery_seconds: float,
    ) -> None:
        self._bus = bus
        self._num_experts = config.num_experts
        self._num_shards = num_shards
        self._timeout_seconds = timeout_seconds
        self._recovery_seconds = recovery_seconds
        self._subjects = [subjects.experts(deployment, shard) for shard in range(num_shards)]
        self._seconds = {layer: DISPATCH_SECONDS.labels(str(layer)) for layer in config.moe_layers}
        self._retries = {reason: DISPATCH_RETRIES.labels(reason) for reason in (*HTTP_STATUS, "no_responders")}
        self._row = {layer: row for row, layer in enumerate(config.moe_layers)}
        self.tokens = np.zeros((len(config.moe_layers), config.num_experts), dtype=np.int64)
        """[L, E]: tokens sent to each expert since the start."""

    def question(
        self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> BusQuestion:
        """The messages of one layer: pairs grouped by shard, rows split where the bus' limit asks for it."""
        calls = self._pack(layer, hidden, top_k_index, top_k_weights)
        return BusQuestion(self, layer, hidden, calls)

    def _pack(
        self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> list[Call]:
        # numpy, as an operation on a few numbers takes a fraction of torch's time there; and each once, for all shards.
        states = hidden.detach().cpu().contiguous()
        dtype, width = WIRE_DTYPE[states.dtype], states.shape[1]
        row_bytes = width * states.element_size()
        raw = states.view(torch.uint8).numpy()  # [T, bytes]: numpy has no bfloat16
        k = top_k_index.shape[1]
        experts = top_k_index.cpu().numpy().ravel()  # [P], token by token
        self.tokens[self._row[layer]] += np.bincount(experts, minlength=self._num_experts)
        most_rows = max(1, (self._bus.max_payload - MESSAGE_OVERHEAD_BYTES) // (row_bytes + k * PAIR_BYTES))
        shard_of_pair = experts % self._num_shards
        order = np.argsort(shard_of_pair, kind="stable")  # by shard, then by token
        pair_ends = np.bincount(shard_of_pair, minlength=self._num_shards).cumsum().tolist()
        token_of_pair = order // k
        first = np.empty(order.size, dtype=bool)  # whether a pair is the first of its token in its shard
        first[0] = True
        np.not_equal(token_of_pair[1:], token_of_pair[:-1], out=first[1:])
        first[[end for end in pair_ends if end < order.size]] = True
        rows = token_of_pair[first]
        sent = raw[rows]  # what each shard is sent, one after the other
        row_of_pair = np.cumsum(first, dtype=np.int32) - np.int32(1)
        sent_experts = experts[order].astype(np.int32)
        sent_weights = top_k_weights.cpu().numpy().ravel()[order]
        calls = []
        pair_start = 0
        for shard, pair_end in enumerate(pair_ends):
            while pair_start < pair_end:
                row_start, row_end = int(row_of_pair[pair_start]), int(row_of_pair[pair_end - 1]) + 1
                stop = pair_end
                if row_end - row_start > most_rows:
                    row_end = row_start + most_rows
                    stop = pair_start + int(np.searchsorted(row_of_pair[pair_start:pair_end], row_end))
                pairs = slice(pair_start, stop)
                shape = (row_end - row_start, width)
                request = ExpertsRequest(
                    layer=layer,
                    hidden_states=wire.Tensor(dtype, shape, sent[row_start:row_end].data.cast("B")),  # type: ignore[arg-type]
                    token_index=wire.Tensor.from_numpy(row_of_pair[pairs] - np.int32(row_start)),
                    expert_index=wire.Tensor.from_numpy(sent_experts[pairs]),
                    weights=wire.Tensor.from_numpy(sent_weights[pairs]),
                )
                calls.append(Call(shard, rows[row_start:row_end], wire.encode(request)))
                pair_start = stop
        return calls

    async def ask(self, layer: int, calls: list[Call]) -> list[bytes]:
        """The answers to `calls`, in their order. All leave at once; what fails is sent again."""
        start = time.monotonic()
        timeout = min(CALL_SECONDS, self._timeout_seconds)
        requests = [(self._subjects[call.shard], call.data) for call in calls]
        answers = await self._bus.request_all(requests, timeout=timeout, headers=_headers(timeout))
        if any(isinstance(answer, MoeError) for answer in answers):
            again = (self._retried(call, answer, start) for call, answer in zip(calls, answers, strict=True))
            answers = list(await asyncio.gather(*again))
            for answer in answers:
                if isinstance(answer, MoeError):
                    raise answer
        self._seconds[layer].observe(time.monotonic() - start)
        return answers  # type: ignore[return-value]

    async def _retried(self, call: Call, answer: bytes | MoeError, start: float) -> bytes | MoeError:
        """The first answer to a call that is none of the errors worth another try; at the end, the reason as a value.

        As a value, so that one failing call does not leave its siblings unfinished.
        """
        deadline = start + self._timeout_seconds
        nobody_since: float | None = None
        broken = 0
        while isinstance(answer, MoeError):
            now = time.monotonic()
            if isinstance(answer, NoRespondersError):
                reason = "no_responders"
                nobody_since = now if nobody_since is None else nobody_since
                if now - nobody_since >= self._recovery_seconds:
                    return self._unavailable(call.shard, "no worker serves it")
            else:
                reason = answer.code
                nobody_since = None
                if reason not in RETRYABLE:
                    broken += 1
                    log.warning("experts.broken", shard=call.shard, code=reason, reason=answer.message)
                    if broken >= MOST_BROKEN_REPLIES:
                        return self._unavailable(call.shard, f"its workers cannot compute a call ({reason})")
            if now + RETRY_PAUSE_SECONDS >= deadline:
                return self._unavailable(call.shard, f"its workers do not answer ({reason})")
            self._retries[reason].inc()
            await asyncio.sleep(RETRY_PAUSE_SECONDS)
            timeout = min(CALL_SECONDS, deadline - time.monotonic())
            request = (self._subjects[call.shard], call.data)
            answer = (await self._bus.request_all([request], timeout=timeout, headers=_headers(timeout)))[0]
        return answer

    def _unavailable(self, shard: int, why: str) -> MoeError:
        return MoeError("shard_unavailable", f"expert shard {shard} is unavailable: {why}; try again in a moment")


class BusQuestion:
    """One layer's calls and their answers."""

    def __init__(self, experts: BusExperts, layer: int, hidden: torch.Tensor, calls: list[Call]) -> None:
        self._experts = experts
        self._layer = layer
        self._hidden = hidden
        self._calls = calls
        self._answers: list[bytes] = []

    async def ask(self) -> None:
        self._answers = await self._experts.ask(self._layer, self._calls)

    def result(self) -> torch.Tensor:
        try:
            return combine(self._hidden, self._calls, self._answers)
        except BadMessageError as error:  # a worker's fault, not the client's
            raise MoeError("shard_unavailable", f"an expert worker's answer is no answer: {error.message}") from None


def combine(hidden: torch.Tensor, calls: list[Call], answers: list[bytes]) -> torch.Tensor:
    """Add the partial sums in shard order, so that the sum does not depend on who answers first.

    Args:
        hidden: [T, H], what was asked: the result has its shape and device.
        calls: the calls, in shard order.
        answers: an encoded ExpertsReply to each, with a row for each of the call's rows.

    Raises:
        BadMessageError: an answer that is not such a reply.

    """
    dtype = WIRE_DTYPE[hidden.dtype]
    width = hidden.shape[1]
    parts = []
    for call, data in zip(calls, answers, strict=True):
        reply = wire.decode(ExpertsReply, data).hidden_states
        check(reply, "hidden_states", (call.rows.size, width), (dtype,))
        parts.append(np.frombuffer(reply.data, dtype=np.uint8))
    rows = torch.from_numpy(np.concatenate([call.rows for call in calls]))
    values = torch.from_numpy(np.concatenate(parts)).view(hidden.dtype).view(-1, width)
    # Row by row, in the order given: the partial sums of a token in shard order.
    return torch.zeros(hidden.shape, dtype=torch.float32).index_add_(0, rows, values.float()).to(hidden.device)


def _headers(timeout: float) -> Headers:
    return {BUDGET_MS: f"{timeout * 1000:.0f}", REQUEST_ID: request_id.get()}
