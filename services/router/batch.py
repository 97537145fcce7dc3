"""One step's tokens, flattened: what the model needs to know about them, as tensors."""

from __future__ import annotations

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

    L is the sequence's length so far, padded; what lies past its end is zero.
    """

    row: int
    count: int
    start: int
    length: int
    """L"""
    slots: slice | torch.Tensor
    """The L slots: a slice where they lie in one piece, which is read without a copy; else their numbers [L]."""
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

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

    token_ids: torch.Tensor
    """[T]"""
    positions: torch.Tensor
    """[T]"""
    rope_lengths: torch.Tensor
    """[T]"""
    slots: torch.Tensor
    """[T]: where each token's key and value go."""
    blank: torch.Tensor | None
    """Slots to be zeroed: read as padding behind a sequence's end, where it has just come to."""
    decodes: list[Context]
    """Of the rows [0, B): one token each."""
    prefills: list[Context]
    logits_rows: torch.Tensor
    """[R] rows whose logits are wanted, in order."""

    @property
    def size(self) -> int:
        return int(self.token_ids.shape[0])


def _slot(blocks: list[int], block_tokens: int, position: int) -> int:
    return blocks[position // block_tokens] * block_tokens + position % block_tokens


def _seen(blocks: list[int], block_tokens: int, end: int, device: torch.device) -> slice | torch.Tensor:
    """The slots of a sequence's positions [0, end), padded."""
    length = padded(end)
    used = blocks[: -(-length // block_tokens)]
    first = used[0]
    if block_tokens % CONTEXT_MULTIPLE == 0 and used == list(range(first, first + len(used))):
        return slice(first * block_tokens, first * block_tokens + length)
    positions = torch.arange(end)
    slots = torch.tensor(blocks)[positions // block_tokens] * block_tokens + positions % block_tokens
    # Slots past a sequence's end may be another's: read block 0, which is zero.
    return F.pad(slots, (0, length - end)).to(device)


def build_batch(spans: list[Span], block_tokens: int, device: torch.device) -> Batch:
    """Flatten `spans`, of which those of one token must come first."""
    token_ids: list[int] = []
    positions: list[int] = []
    lengths: list[int] = []
    slots: list[int] = []
    blank: list[int] = []
    logits_rows: list[int] = []
    decodes: list[Context] = []
    prefills: list[Context] = []
    for span in spans:
        row, count, end = len(token_ids), len(span.token_ids), span.end
        token_ids += span.token_ids
        positions += range(span.start, end)
        lengths += [max(span.prompt_length, position + 1) for position in range(span.start, end)]
        logits_rows += range(row + max(0, span.logits_from - span.start), row + count)
        slots += [_slot(span.blocks, block_tokens, position) for position in range(span.start, end)]
        seen = _seen(span.blocks, block_tokens, end, device)
        if isinstance(seen, slice) and padded(end) - CONTEXT_MULTIPLE >= span.start:
            blank += range(slots[-1] + 1, seen.stop)
        context = Context(row, count, span.start, padded(end), seen)
        (prefills if count > 1 else decodes).append(context)
    return Batch(
        token_ids=torch.tensor(token_ids, device=device),
        positions=torch.tensor(positions, device=device),
        rope_lengths=torch.tensor(lengths, device=device),
        slots=torch.tensor(slots, device=device),
        blank=torch.tensor(blank, device=device) if blank else None,
        decodes=decodes,
        prefills=prefills,
        logits_rows=torch.tensor(logits_rows, dtype=torch.int64, device=device),
    )
