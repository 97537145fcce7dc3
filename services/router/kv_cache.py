"""The KV cache: a fixed budget of blocks, given out and taken back by number."""

from __future__ import annotations

import math

import numpy as np
import torch

from shared.checkpoint import ModelConfig
from shared.settings import MIB


class BlockPool:
    """Free block numbers. Block 0 is never given out: padding reads it, and it stays zero."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._free = list(range(num_blocks, 0, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the blocks in use, 0 to 1."""
        return 1 - len(self._free) / self.num_blocks

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def take(self, count: int) -> list[int] | None:
        """`count` blocks, or None if there are not so many."""
        if count > len(self._free):
            return None
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return taken

    def give_back(self, blocks: list[int]) -> None:
        self._free.extend(reversed(blocks))


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


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
