"""The experts over NATS: one message per shard and layer, and the answers combined in shard order."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import structlog
import torch

from services.expert.messages import ExpertsReply, ExpertsRequest
from services.router.calls import Calls
from shared import wire
from shared.bus import Bus
from shared.checkpoint import ModelConfig
from shared.errors import BadMessageError, MoeError
from shared.instrumentation import BAD_MESSAGES, DISPATCH_SECONDS
from shared.settings import DegradedMode
from shared.tensors import WIRE_DTYPE, check

log = structlog.get_logger()

MESSAGE_OVERHEAD_BYTES = 512
PAIR_BYTES = 12


Pairs = tuple[torch.Tensor, torch.Tensor]
"""The experts [T, k] of each token, and their weights [T, k]."""


@dataclass(frozen=True)
class Call:
    """One message: some rows of the batch, to one shard."""

    shard: int
    row_numbers: npt.NDArray[np.int64]
    """[n]: rows of the batch, ascending."""
    data: bytes

    @property
    def rows(self) -> int:
        return self.row_numbers.size


class BusExperts:
    """Packs each layer's question, has it asked, and combines the answers."""

    def __init__(
        self, bus: Bus, config: ModelConfig, calls: Calls, *, num_shards: int, degraded_mode: DegradedMode = "fail"
    ) -> None:
        self._bus = bus
        self.calls = calls
        self._num_experts = config.num_experts
        self._num_shards = num_shards
        self._skips = degraded_mode == "skip"
        self._seconds = {layer: DISPATCH_SECONDS.labels(str(layer)) for layer in config.moe_layers}
        self._row = {layer: row for row, layer in enumerate(config.moe_layers)}
        self.tokens = np.zeros((len(config.moe_layers), config.num_experts), dtype=np.int64)
        """[L, E]: tokens sent to each expert since the start."""

    def question(
        self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> BusQuestion:
        """The messages of one layer: pairs grouped by shard, rows split where the bus' limit asks for it."""
        calls = self._pack(layer, hidden, top_k_index, top_k_weights)
        return BusQuestion(self, layer, hidden, (top_k_index, top_k_weights), calls)

    def share(self, routing: Pairs, missing: set[int]) -> torch.Tensor:
        """[T] float32: the weights of all of a token's experts, over those of the experts that are left; 0 if none is.

        A sum that lacks some experts, times this, is as if the others' gate weights had been renormalised.
        """
        index, weights = (part.cpu() for part in routing)
        left = torch.isin(index % self._num_shards, torch.tensor(sorted(missing)), invert=True)
        remaining = (weights * left).sum(dim=-1)
        return torch.where(remaining > 0, weights.sum(dim=-1) / remaining, 0.0).float()

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

    async def ask(self, layer: int, calls: list[Call]) -> list[bytes | None]:
        """The answers to `calls`, in their order; None for those that DEGRADED_MODE=skip does without.

        Raises:
            MoeError: `shard_unavailable`, with DEGRADED_MODE=fail.

        """
        start = time.monotonic()
        answers = await self.calls.ask(calls)
        for number, answer in enumerate(answers):
            if isinstance(answer, MoeError):
                if not self._skips:
                    raise answer
                log.warning("experts.skipped", layer=layer, shard=calls[number].shard, reason=answer.message)
                answers[number] = None  # type: ignore[call-overload]
        self._seconds[layer].observe(time.monotonic() - start)
        return answers  # type: ignore[return-value]


class BusQuestion:
    """One layer's calls and their answers."""

    def __init__(
        self, experts: BusExperts, layer: int, hidden: torch.Tensor, routing: Pairs, calls: list[Call]
    ) -> None:
        self._experts = experts
        self._layer = layer
        self._hidden = hidden
        self._routing = routing
        self._calls = calls
        self._answers: list[bytes | None] = []
        self.degraded: torch.Tensor | None = None
        """[T] bool, after `ask`: rows that lack some of their experts; None if none does."""

    async def ask(self) -> None:
        self._answers = await self._experts.ask(self._layer, self._calls)
        if None in self._answers:
            self.degraded = torch.zeros(self._hidden.shape[0], dtype=torch.bool)
            for call, answer in zip(self._calls, self._answers, strict=True):
                if answer is None:
                    self.degraded[call.row_numbers] = True

    def result(self) -> torch.Tensor:
        try:
            if self.degraded is None:
                return combine(self._hidden, self._calls, self._answers)  # type: ignore[arg-type]
            if all(answer is None for answer in self._answers):
                return torch.zeros(self._hidden.shape, dtype=torch.float32, device=self._hidden.device)
            answered = [(c, a) for c, a in zip(self._calls, self._answers, strict=True) if a is not None]
            out = combine(self._hidden, [c for c, _ in answered], [a for _, a in answered])
            missing = {c.shard for c, a in zip(self._calls, self._answers, strict=True) if a is None}
            return out * self._experts.share(self._routing, missing).to(out.device)[:, None]
        except BadMessageError as error:  # a worker's fault, not the client's
            BAD_MESSAGES.labels("reply").inc()
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
        check(reply, "hidden_states", (call.rows, width), (dtype,))
        parts.append(np.frombuffer(reply.data, dtype=np.uint8))
    rows = torch.from_numpy(np.concatenate([call.row_numbers for call in calls]))
    values = torch.from_numpy(np.concatenate(parts)).view(hidden.dtype).view(-1, width)
    # Row by row, in the order given: the partial sums of a token in shard order.
    return torch.zeros(hidden.shape, dtype=torch.float32).index_add_(0, rows, values.float()).to(hidden.device)
