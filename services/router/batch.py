"""One step's tokens, flattened: what the model needs to know about them, as tensors."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

CONTEXT_MULTIPLE = 64
"""Contexts are padded to multiples of this, so that attention sums a row in the same order however long they are."""


def padded(length: int) -> int:
    return -(-length // CONTEXT_MULTIPLE) * CONTEXT_MULTIPLE


@dataclass(frozen=True)
class Span:
    """`count` tokens of one sequence, from position `start`."""

    token_ids: list[int]
    """The span's tokens."""
    start: int
    prompt_length: int
    blocks: list[int]
    """All blocks of the sequence, in order."""
    logits_from: int
    """Rows from this position on need logits; beyond the span's end: none."""

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@dataclass
class Context:
    """Rows [row, row + count) of a batch: a sequence's tokens from position `start`, and the slots that they see.

    L is the sequence's length so far, padded; what lies past its end is read from block 0, which is zero.
    """

    row: int
    count: int
    start: int
    slots: torch.Tensor
    """[L]"""
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """L, a multiple of CONTEXT_MULTIPLE."""
        return int(self.slots.shape[0])

    @property
    def is_whole(self) -> bool:
        """Whether these are all of the sequence's tokens, and no padding is needed."""
        return not self.start and self.length == self.count

    def mask(self, window: int | None, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """[count, L], to be added to the scores: 0 where a row sees a position, else minus infinity.

        Made once for all layers with the same window.
        """
        made = self._masks.get(window)
        if made is None:
            columns = torch.arange(self.length, device=device)
            at = torch.arange(self.start, self.start + self.count, device=device)[:, None]
            hidden = columns > at
            if window is not None:
                hidden |= columns <= at - window
            made = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
            self._masks[window] = made
        return made


@dataclass(frozen=True)
class Batch:
    """T tokens of one step. Decoding sequences come first."""

    spans: list[Span]
    block_tokens: int
    token_ids: torch.Tensor
    """[T]"""
    positions: torch.Tensor
    """[T]"""
    rope_lengths: torch.Tensor
    """[T]"""
    slots: torch.Tensor
    """[T]: where each token's key and value go."""
    logits_rows: torch.Tensor
    """[R] rows whose logits are wanted, in order."""

    @property
    def size(self) -> int:
        return int(self.token_ids.shape[0])

    @functools.cached_property
    def contexts(self) -> list[Context]:
        """What each span's rows see, in the rows' order."""
        contexts, row = [], 0
        for span in self.spans:
            slots = _seen(span.blocks, self.block_tokens, span.end).to(self.slots.device)
            contexts.append(Context(row, len(span.token_ids), span.start, slots))
            row += len(span.token_ids)
        return contexts


def _seen(blocks: list[int], block_tokens: int, end: int) -> torch.Tensor:
    """The slots of a sequence's positions [0, end), padded."""
    used = torch.tensor(blocks[: -(-end // block_tokens)])
    slots = (used[:, None] * block_tokens + torch.arange(block_tokens)).flatten()[:end]
    return F.pad(slots, (0, padded(end) - end))


def build_batch(spans: list[Span], block_tokens: int, device: torch.device) -> Batch:
    """Flatten `spans`, of which those of one token must come first."""
    token_ids: list[int] = []
    positions: list[int] = []
    lengths: list[int] = []
    slots: list[int] = []
    logits_rows: list[int] = []
    for span in spans:
        row, end, blocks = len(token_ids), span.end, span.blocks
        token_ids += span.token_ids
        positions += range(span.start, end)
        lengths += [max(span.prompt_length, position + 1) for position in range(span.start, end)]
        logits_rows += range(row + max(0, span.logits_from - span.start), row + len(span.token_ids))
        slots += [blocks[p // block_tokens] * block_tokens + p % block_tokens for p in range(span.start, end)]
    return Batch(
        spans=spans,
        block_tokens=block_tokens,
        token_ids=torch.tensor(token_ids, device=device),
        positions=torch.tensor(positions, device=device),
        rope_lengths=torch.tensor(lengths, device=device),
        slots=torch.tensor(slots, device=device),
        logits_rows=torch.tensor(logits_rows, dtype=torch.int64, device=device),
    )
