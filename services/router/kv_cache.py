"""The KV cache: a fixed budget of blocks, given out and taken back by number."""

from __future__ import annotations

import heapq
import math

import numpy as np
import torch

from shared.checkpoint import ModelConfig
from shared.settings import MIB


class BlockPool:
    """Free block numbers, of which the lowest are given out first: memory that was never needed is never touched.

    Block 0 is never given out: padding reads it, and it stays zero.
    """

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._free = list(range(1, num_blocks + 1))  # a heap

    @property
    def free(self) -> int:
        """How many blocks are free."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the blocks in use, 0 to 1."""
        return 1 - self.free / self.num_blocks

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def take(self, count: int) -> list[int] | None:
        """`count` blocks; None if there are not so many."""
        if count > len(self._free):
            return None
        return [heapq.heappop(self._free) for _ in range(count)]

    def give_back(self, blocks: list[int]) -> None:
        for block in blocks:
            heapq.heappush(self._free, block)


def num_blocks(budget_mb: int, block_bytes: int) -> int:
    """Blocks of `block_bytes` to give out that fit into the budget, beside block 0."""
    return max(0, budget_mb * MIB // block_bytes - 1)


class KVCache:
    """Keys and values of every layer, [slots, kv_heads, head_dim]; slot = block × block_tokens + offset.

    On a CPU memory is taken as it is touched, so the budget is an upper bound, not a cost at start.
    """

    def __init__(
        self, config: ModelConfig, blocks: int, block_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = ((blocks + 1) * block_tokens, config.num_key_value_heads, config.head_dim)
        self.keys = [zeros(shape, dtype, device) for _ in range(config.num_hidden_layers)]
        self.values = [zeros(shape, dtype, device) for _ in range(config.num_hidden_layers)]
        self._dtype = dtype

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keep `keys` and `values` [T, kv_heads, D] in the slots [T]."""
        self.keys[layer].index_copy_(0, slots, keys.to(self._dtype))
        self.values[layer].index_copy_(0, slots, values.to(self._dtype))


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that take memory only where they are touched, on a CPU.

    There they come from the operating system (calloc, by way of numpy); torch.zeros would write all of them.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
