"""The experts over NATS: one message per shard and layer, and the answers combined in shard order."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt
import structlog
import torch

from services.expert.messages import ExpertsReply, ExpertsRequest
from services.router.calls import Calls
from services.router.splitting import Table, part_of
from shared import wire
from shared.bus import Bus
from shared.checkpoint import ModelConfig
from shared.errors import BadMessageError, MoeError
from shared.instrumentation import BAD_MESSAGES, DISPATCH_AT_HOME, DISPATCH_SECONDS
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
Numbers = npt.NDArray[np.int64]
NOTHING = np.zeros(0, dtype=np.int64)
AT_HOME = {"wrong_shard", "shard_unavailable"}
"""Errors after which what was for copies is asked of the experts' own shards."""


@dataclass(eq=False, slots=True)
class Call:
    """One message: some rows of the batch, to one shard."""

    shard: int
    row_numbers: Numbers
    """[n]: rows of the batch, ascending."""
    data: bytes
    pairs: Numbers = field(default_factory=lambda: NOTHING)
    """[P]: the call's pairs, numbered token by token."""
    moved: bool = False
    """Some of its pairs are for copies, which the experts' own shards can do without."""

    @property
    def rows(self) -> int:
        return self.row_numbers.size


@dataclass(eq=False, slots=True)
class Asked:
    """One layer's question, in numpy, as an operation on a few numbers takes a fraction of torch's time there."""

    layer: int
    dtype: str
    width: int
    """H"""
    rows: npt.NDArray[np.uint8]
    """[T, bytes]: numpy has no bfloat16."""
    top_k: int
    experts: Numbers
    """[T * k], token by token."""
    weights: npt.NDArray[np.float32]
    """[T * k]"""

    @classmethod
    def of(cls, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Self:
        states = hidden.detach().cpu().contiguous()
        return cls(
            layer,
            WIRE_DTYPE[states.dtype],
            states.shape[1],
            states.view(torch.uint8).numpy(),
            top_k_index.shape[1],
            top_k_index.cpu().numpy().ravel(),
            top_k_weights.cpu().numpy().ravel(),
        )


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
        self.shard_tokens = np.zeros((len(config.moe_layers), num_shards), dtype=np.int64)
        """[L, S]: pairs of a token and an expert sent to each shard since the start."""
        self.calls_at_home = 0
        """Calls since the start for what was meant for copies that were not there."""
        self.table: Table | None = None
        """Where the plan in use has each expert's tokens computed; None: expert e in shard e mod S."""

    def question(
        self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> BusQuestion:
        """The messages of one layer: pairs grouped by shard, rows split where the bus' limit asks for it."""
        asked = Asked.of(layer, hidden, top_k_index, top_k_weights)
        return BusQuestion(self, asked, hidden, (top_k_index, top_k_weights), self._pack(asked))

    def share(self, routing: Pairs, lost: torch.Tensor) -> torch.Tensor:
        """[T] float32: the weights of all of a token's experts, over those of the experts that are left; 0 if none is.

        A sum that lacks some experts, times this, is as if the others' gate weights had been renormalised.

        Args:
            routing: the experts [T, k] and their weights [T, k].
            lost: [T, k] bool, which pairs are missing.

        """
        weights = routing[1].cpu()
        left = ~lost  # [T, k]
        remaining = (weights * left).sum(dim=-1)
        factor = torch.where(remaining > 0, weights.sum(dim=-1) / remaining, 0.0)
        return torch.where(left.all(dim=-1), 1.0, factor).float()

    def _pack(self, asked: Asked) -> list[Call]:
        """The calls that ask for all pairs."""
        row, experts = self._row[asked.layer], asked.experts
        self.tokens[row] += np.bincount(experts, minlength=self._num_experts)
        table = self.table
        if table is None:
            shard_of_pair = experts % self.num_shards
            moved = None
        else:
            shard_of_pair = table[row][experts, np.repeat(part_of(asked.rows), asked.top_k)]
            moved = shard_of_pair != experts % self.num_shards
        order = np.argsort(shard_of_pair, kind="stable")  # by shard, then by token
        if moved is not None:
            moved = moved[order]
        counts = np.bincount(shard_of_pair, minlength=self.num_shards)
        self.shard_tokens[row] += counts
        return self._calls(asked, order, counts, moved)

    def _home(self, asked: Asked, call: Call) -> list[Call]:
        """The calls that ask for the pairs of `call` where the experts have their home, which always has them."""
        shards = asked.experts[call.pairs] % self.num_shards
        order = call.pairs[np.argsort(shards, kind="stable")]
        calls = self._calls(asked, order, np.bincount(shards, minlength=self.num_shards), None)
        self.calls_at_home += len(calls)
        return calls

    def _calls(
        self, asked: Asked, order: Numbers, counts: npt.NDArray[np.intp], moved: npt.NDArray[np.bool_] | None
    ) -> list[Call]:
        """The calls that ask for the pairs `order`, in shard order.

        Args:
            asked: what all is about.
            order: numbers of pairs, by shard, then by token.
            counts: [S], how many of them each shard gets.
            moved: whether each of them is for a copy; None: none is.

        """
        k, width = asked.top_k, asked.rows.shape[1]
        most_rows = max(1, (self._bus.max_payload - MESSAGE_OVERHEAD_BYTES) // (width + k * PAIR_BYTES))
        pair_ends = counts.cumsum().tolist()
        token_of_pair = order // k
        first = np.empty(order.size, dtype=bool)  # whether a pair is the first of its token in its shard
        first[0] = True
        np.not_equal(token_of_pair[1:], token_of_pair[:-1], out=first[1:])
        first[[end for end in pair_ends if end < order.size]] = True
        rows = token_of_pair[first]
        sent = asked.rows[rows]  # what each shard is sent, one after the other
        row_of_pair = np.cumsum(first, dtype=np.int32) - np.int32(1)
        sent_experts = asked.experts[order].astype(np.int32)
        sent_weights = asked.weights[order]
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
                shape = (row_end - row_start, asked.width)
                request = ExpertsRequest(
                    layer=asked.layer,
                    hidden_states=wire.Tensor(asked.dtype, shape, sent[row_start:row_end].data.cast("B")),  # type: ignore[arg-type]
                    token_index=wire.Tensor.from_numpy(row_of_pair[pairs] - np.int32(row_start)),
                    expert_index=wire.Tensor.from_numpy(sent_experts[pairs]),
                    weights=wire.Tensor.from_numpy(sent_weights[pairs]),
                )
                to_copies = moved is not None and bool(moved[pairs].any())
                calls.append(Call(shard, rows[row_start:row_end], wire.encode(request), order[pairs], to_copies))
                pair_start = stop
        return calls

    async def ask(
        self, asked: Asked, calls: list[Call], read: Callable[[Call, bytes], Rows]
    ) -> tuple[list[Call], list[Rows | None]]:
        """The calls that were made in the end, and to each its answer; None where DEGRADED_MODE=skip does without.

        Raises:
            MoeError: `shard_unavailable`, with DEGRADED_MODE=fail.

        """
        start = time.monotonic()
        made, answers = await self._ask(asked, calls, read, start)
        self._seconds[asked.layer].observe(time.monotonic() - start)
        return made, answers

    async def _ask(
        self, asked: Asked, calls: list[Call], read: Callable[[Call, bytes], Rows], start: float
    ) -> tuple[list[Call], list[Rows | None]]:
        made: list[Call] = []
        answers: list[Rows | None] = []
        again: list[Call] = []
        for call, answer in zip(
            calls, await self.calls.ask(calls, lambda number, data: read(calls[number], data)), strict=True
        ):
            if isinstance(answer, MoeError):
                if call.moved and answer.code in AT_HOME:
                    log.info("experts.at_home", shard=call.shard, reason=answer.message)
                    DISPATCH_AT_HOME.inc()
                    again += self._home(asked, call)
                    continue
                if not self._skips:
                    raise answer
                self._skip(call.shard, answer, start)
                answers.append(None)
            else:
                answers.append(answer)
            made.append(call)
        if not again:
            return made, answers
        more = await self._ask(asked, again, read, start)  # which are moved no more
        return made + more[0], answers + more[1]

    def _skip(self, shard: int, why: MoeError, now: float) -> None:
        """Say now and then that a shard is done without."""
        if now - self._skipped_at.get(shard, -LOG_SECONDS) >= LOG_SECONDS:
            self._skipped_at[shard] = now
            log.warning("experts.skipped", shard=shard, reason=why.message)


class BusQuestion:
    """One layer's calls and their answers."""

    def __init__(
        self, experts: BusExperts, asked: Asked, hidden: torch.Tensor, routing: Pairs, calls: list[Call]
    ) -> None:
        self._experts = experts
        self._asked = asked
        self._hidden = hidden
        self._routing = routing
        self._calls = calls
        self._answers: list[Rows | None] = []
        self._dtypes = (asked.dtype,)
        self.degraded: torch.Tensor | None = None
        """[T] bool, after `ask`: rows that lack some of their experts; None if none does."""

    async def ask(self) -> None:
        self._calls, self._answers = await self._experts.ask(self._asked, self._calls, self._read)
        if any(answer is None for answer in self._answers):
            self.degraded = self._lost().any(dim=-1)

    def _read(self, call: Call, data: bytes) -> Rows:
        """A worker's reply to `call`.

        Raises:
            BadMessageError: it is none.

        """
        try:
            reply = wire.decode(ExpertsReply, data).hidden_states
            check(reply, "hidden_states", (call.rows, self._hidden.shape[1]), self._dtypes)
        except BadMessageError:
            BAD_MESSAGES.labels("reply").inc()
            raise
        return np.frombuffer(reply.data, dtype=np.uint8)

    def _lost(self) -> torch.Tensor:
        """[T, k] bool: which pairs are missing."""
        lost = torch.zeros(self._routing[0].shape, dtype=torch.bool)
        for call, answer in zip(self._calls, self._answers, strict=True):
            if answer is None:
                lost.view(-1)[torch.from_numpy(call.pairs)] = True
        return lost

    def result(self) -> torch.Tensor:
        answered = [(c, a) for c, a in zip(self._calls, self._answers, strict=True) if a is not None]
        out = combine(self._hidden, [c for c, _ in answered], [a for _, a in answered])
        if self.degraded is None:
            return out
        return out * self._experts.share(self._routing, self._lost()).to(out.device)[:, None]


def combine(hidden: torch.Tensor, calls: list[Call], answers: list[Rows]) -> torch.Tensor:
    """Add the partial sums in the calls' order, so that the sum does not depend on who answers first.

    Args:
        hidden: [T, H], what was asked: the result has its shape and device.
        calls: the calls, in shard order; behind them those that were asked again at home.
        answers: to each a row for each of the call's rows, in hidden's dtype.

    """
    out = torch.zeros(hidden.shape, dtype=torch.float32)
    if calls:
        rows = torch.from_numpy(np.concatenate([call.row_numbers for call in calls]))
        values = torch.from_numpy(np.concatenate(answers)).view(hidden.dtype).view(-1, hidden.shape[1])
        # Row by row, in the order given.
        out.index_add_(0, rows, values.float())
    return out.to(hidden.device)
