"""The experts over NATS: one message per shard and layer, and the answers combined in shard order."""

from __future__ import annotations

import time
from collections.abc import Callable
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
LOG_SECONDS = 10.0


Rows = npt.NDArray[np.uint8]
"""The bytes of a worker's answer."""
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
        self.num_shards = num_shards
        self._skipped_at: dict[int, float] = {}
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

    def share(self, routing: Pairs, lost: torch.Tensor) -> torch.Tensor:
        """[T] float32: the weights of all of a token's experts, over those of the experts that are left; 0 if none is.

        A sum that lacks some experts, times this, is as if the others' gate weights had been renormalised.

        Args:
            routing: the experts [T, k] and their weights [T, k].
            lost: [T, S] bool, which shards' part of which rows is missing.

        """
        index, weights = (part.cpu() for part in routing)
        left = ~lost.gather(1, index % self.num_shards)  # [T, k]
        remaining = (weights * left).sum(dim=-1)
        factor = torch.where(remaining > 0, weights.sum(dim=-1) / remaining, 0.0)
        return torch.where(left.all(dim=-1), 1.0, factor).float()

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
        shard_of_pair = experts % self.num_shards
        order = np.argsort(shard_of_pair, kind="stable")  # by shard, then by token
        pair_ends = np.bincount(shard_of_pair, minlength=self.num_shards).cumsum().tolist()
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

    async def ask(self, layer: int, calls: list[Call], read: Callable[[int, bytes], Rows]) -> list[Rows | None]:
        """The answers to `calls`, in their order; None for those that DEGRADED_MODE=skip does without.

        Raises:
            MoeError: `shard_unavailable`, with DEGRADED_MODE=fail.

        """
        start = time.monotonic()
        answers: list[Rows | None] = []
        for call, answer in zip(calls, await self.calls.ask(calls, read), strict=True):
            if isinstance(answer, MoeError):
                if not self._skips:
                    raise answer
                self._skip(call.shard, answer, start)
                answers.append(None)
            else:
                answers.append(answer)
        self._seconds[layer].observe(time.monotonic() - start)
        return answers

    def _skip(self, shard: int, why: MoeError, now: float) -> None:
        """Say now and then that a shard is done without."""
        if now - self._skipped_at.get(shard, -LOG_SECONDS) >= LOG_SECONDS:
            self._skipped_at[shard] = now
            log.warning("experts.skipped", shard=shard, reason=why.message)


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
        self._answers: list[Rows | None] = []
        self._dtypes = (WIRE_DTYPE[hidden.dtype],)
        self.degraded: torch.Tensor | None = None
        """[T] bool, after `ask`: rows that lack some of their experts; None if none does."""

    async def ask(self) -> None:
        self._answers = await self._experts.ask(self._layer, self._calls, self._read)
        if any(answer is None for answer in self._answers):
            self.degraded = self._lost().any(dim=-1)

    def _read(self, number: int, data: bytes) -> Rows:
        """A worker's reply to one call.

        Raises:
            BadMessageError: it is none.

        """
        try:
            reply = wire.decode(ExpertsReply, data).hidden_states
            check(reply, "hidden_states", (self._calls[number].rows, self._hidden.shape[1]), self._dtypes)
        except BadMessageError:
            BAD_MESSAGES.labels("reply").inc()
            raise
        return np.frombuffer(reply.data, dtype=np.uint8)

    def _lost(self) -> torch.Tensor:
        """[T, S] bool: which shards' part of which rows is missing."""
        lost = torch.zeros(self._hidden.shape[0], self._experts.num_shards, dtype=torch.bool)
        for call, answer in zip(self._calls, self._answers, strict=True):
            if answer is None:
                lost[torch.from_numpy(call.row_numbers), call.shard] = True
        return lost

    def result(self) -> torch.Tensor:
        answered = [(c, a) for c, a in zip(self._calls, self._answers, strict=True) if a is not None]
        out = combine(self._hidden, [c for c, _ in answered], [a for _, a in answered])
        if self.degraded is None:
            return out
        return out * self._experts.share(self._routing, self._lost()).to(out.device)[:, None]


def combine(hidden: torch.Tensor, calls: list[Call], answers: list[Rows]) -> torch.Tensor:
    """Add the partial sums in shard order, so that the sum does not depend on who answers first.

    Args:
        hidden: [T, H], what was asked: the result has its shape and device.
        calls: the calls, in shard order.
        answers: to each a row for each of the call's rows, in hidden's dtype.

    """
    out = torch.zeros(hidden.shape, dtype=torch.float32)
    if calls:
        rows = torch.from_numpy(np.concatenate([call.row_numbers for call in calls]))
        values = torch.from_numpy(np.concatenate(answers)).view(hidden.dtype).view(-1, hidden.shape[1])
        # Row by row, in the order given: the partial sums of a token in shard order.
        out.index_add_(0, rows, values.float())
    return out.to(hidden.device)
