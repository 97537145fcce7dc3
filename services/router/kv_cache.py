"""The KV cache: a fixed budget of blocks, given out and taken back by number."""

from __future__ import annotations

import bisect
import math

import numpy as np
import torch

from shared.checkpoint import ModelConfig
from shared.settings import MIB

ROOM_BLOCKS = 16
"""What a sequence may grow by in one piece: 1024 tokens in blocks of 64."""


class BlockPool:
    """Free block numbers. Block 0 is never given out: padding reads it, and it stays zero.

    Blocks are given out so that a sequence's lie in one piece as far as possible, as attention then reads them where
    they are. A new sequence begins in the first free run that leaves it and the one before ROOM_BLOCKS to grow: low
    numbers are used again and again, and memory that no sequence has needed yet is never touched.
    """

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.free = num_blocks
        """How many blocks are free."""
        self._runs: list[tuple[int, int]] = [(1, num_blocks + 1)] if num_blocks else []
        """Free runs [first, end), in order, none touching the next."""

    @property
    def usage(self) -> float:
        """Share of the blocks in use, 0 to 1."""
        return 1 - self.free / self.num_blocks

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def take(self, count: int, after: int | None = None) -> list[int] | None:
        """`count` blocks, those behind block `after` if they are free; None if there are not so many."""
        if count > self.free:
            return None
        taken: list[int] = []
        if after is not None:
            at = bisect.bisect_left(self._runs, (after + 1, 0))
            if at < len(self._runs) and self._runs[at][0] == after + 1:
                taken += self._cut(at, after + 1, count)
        while len(taken) < count:
            missing = count - len(taken)
            taken += self._cut(*self._place(missing), missing)
        return taken

    def _place(self, count: int) -> tuple[int, int]:
        """Where `count` blocks begin: (number of the run, block)."""
        for at, (first, end) in enumerate(self._runs):
            start = first if first == 1 else first + ROOM_BLOCKS
            if end - start >= count + ROOM_BLOCKS:
                return at, start
        at = max(range(len(self._runs)), key=lambda i: self._runs[i][1] - self._runs[i][0])
        first, end = self._runs[at]
        return at, max(first, min((first + end) // 2, end - count))

    def _cut(self, at: int, start: int, count: int) -> list[int]:
        """Up to `count` blocks from `start` on, out of the run number `at`."""
        first, end = self._runs[at]
        stop = min(end, start + count)
        self._runs[at : at + 1] = [run for run in ((first, start), (stop, end)) if run[0] < run[1]]
        self.free -= stop - start
        return list(range(start, stop))

    def give_back(self, blocks: list[int]) -> None:
        for block in sorted(blocks):
            at = bisect.bisect_left(self._runs, (block, 0))
            before = at > 0 and self._runs[at - 1][1] == block
            behind = at < len(self._runs) and self._runs[at][0] == block + 1
            first = self._runs[at - 1][0] if before else block
            end = self._runs[at][1] if behind else block + 1
            self._runs[at - before : at + behind] = [(first, end)]
        self.free += len(blocks)


def block_bytes(config: ModelConfig, block_tokens: int, itemsize: int) -> int:
    """Bytes that one block takes, keys and values of all layers."""
    return 2 * config.num_hidden_layers * block_tokens * config.num_key_value_heads * config.head_dim * itemsize


def num_blocks(config: ModelConfig, budget_mb: int, block_tokens: int, itemsize: int) -> int:
    """Blocks to give out that fit into the budget, beside block 0."""
    return max(0, budget_mb * MIB // block_bytes(config, block_tokens, itemsize) - 1)


class KVCache:
    """Keys and values of every layer, [slots, kv_heads, head_dim]; slot = block × block_tokens + offset.

    On a CPU memory comes zeroed from the operating system as it is touched (calloc, by way of numpy; torch.zeros would
    write all of it), so the budget is an upper bound, not a cost at start.
    """

    def __init__(
        self, config: ModelConfig, blocks: int, block_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = ((blocks + 1) * block_tokens, config.num_key_value_heads, config.head_dim)
        self.keys = [_zeros(shape, dtype, device) for _ in range(config.num_hidden_layers)]
        self.values = [_zeros(shape, dtype, device) for _ in range(config.num_hidden_layers)]
        self._dtype = dtype

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keep `keys` and `values` [T, kv_heads, D] in the slots [T]."""
        self.keys[layer].index_copy_(0, slots, keys.to(self._dtype))
        self.values[layer].index_copy_(0, slots, values.to(self._dtype))

    def clear(self, layer: int, slots: torch.Tensor) -> None:
        """Zero the slots [n]."""
        self.keys[layer].index_fill_(0, slots, 0)
        self.values[layer].index_fill_(0, slots, 0)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
