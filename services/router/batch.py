"""One step's tokens, flattened: what the model needs to know about them, as tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

CONTEXT_MULTIPLE = 64
"""Contexts are padded to multiples of this: attention then sums in the same order whatever the longest context is."""


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


@dataclass(frozen=True)
class Prefill:
    """Rows [row, row + count): one sequence's tokens from position `start`, attending to `context` [L] slots."""

    row: int
    count: int
    start: int
    context: torch.Tensor


@dataclass(frozen=True)
class Decode:
    """Single tokens of many sequences: rows [0, B), attending to `context` [B, L] slots where `valid` [B, L]."""

    context: torch.Tensor
    valid: torch.Tensor
    lengths: torch.Tensor
    """[B]"""


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
    decode: Decode | None
    prefills: list[Prefill]
    logits_rows: torch.Tensor
    """[R] rows whose logits are wanted, in order."""

    @property
    def size(self) -> int:
        return int(self.token_ids.shape[0])


def _slots(blocks: list[int], block_tokens: int, start: int, end: int) -> torch.Tensor:
    """Slots of the positions [start, end) of a sequence with these blocks."""
    positions = torch.arange(start, end)
    return torch.tensor(blocks)[positions // block_tokens] * block_tokens + positions % block_tokens


def build_batch(spans: list[Span], block_tokens: int, device: torch.device) -> Batch:
    """Flatten `spans`, of which those of one token must come first."""
    token_ids: list[int] = []
    positions: list[int] = []
    lengths: list[int] = []
    logits_rows: list[int] = []
    singles = [span for span in spans if len(span.token_ids) == 1]
    slots: list[torch.Tensor] = []
    prefills: list[Prefill] = []
    decode = None
    if singles:
        ends = torch.tensor([span.end for span in singles])  # [B]
        longest = max(len(span.blocks) for span in singles)
        table = torch.tensor([span.blocks + [0] * (longest - len(span.blocks)) for span in singles])  # [B, blocks]
        context = (table[:, :, None] * block_tokens + torch.arange(block_tokens)).flatten(1)  # [B, L]
        slots.append(context.gather(1, (ends - 1)[:, None]).squeeze(1))
        length = padded(int(ends.max()))
        context = F.pad(context[:, :length], (0, max(0, length - context.shape[1])))
        valid = torch.arange(length) < ends[:, None]
        # Slots past a sequence's end may hold another's leftovers: read block 0, which is zero.
        context = torch.where(valid, context, 0)
        decode = Decode(context.to(device), valid.to(device), ends.to(device))
    for span in spans:
        row = len(token_ids)
        count = len(span.token_ids)
        token_ids += span.token_ids
        positions += range(span.start, span.end)
        lengths += [max(span.prompt_length, position + 1) for position in range(span.start, span.end)]
        logits_rows += [row + i for i in range(count) if span.start + i >= span.logits_from]
        if count > 1:
            context = _slots(span.blocks, block_tokens, 0, span.end)
            slots.append(context[span.start :])
            context = F.pad(context, (0, padded(span.end) - span.end))
            prefills.append(Prefill(row, count, span.start, context.to(device)))
    return Batch(
        token_ids=torch.tensor(token_ids, device=device),
        positions=torch.tensor(positions, device=device),
        rope_lengths=torch.tensor(lengths, device=device),
        slots=torch.cat(slots).to(device),
        decode=decode,
        prefills=prefills,
        logits_rows=torch.tensor(logits_rows, dtype=torch.int64, device=device),
    )
