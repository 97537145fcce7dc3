"""Weights as the kernels read them."""

from __future__ import annotations

import ctypes

import torch

from shared.kernels.build import load_kernels

TILE = 64
"""Outputs, or positions of the KV cache, that are summed together."""
HALF = TILE // 2
"""Of a tile of gate and up: so many outputs of each."""


def whole(size: int, unit: int) -> int:
    """`size`, rounded up to a multiple of `unit`."""
    return -(-size // unit) * unit


def pack(weight: torch.Tensor, *, inputs: int, tiles: int, in_halves: bool = False) -> torch.Tensor:
    """A copy of `weight` [out, in] in tiles, [tiles, inputs, TILE] flattened; what is padded is zero.

    Args:
        weight: float32, bfloat16 or int8; with `in_halves`, gate's rows and then up's, [2I, H].
        inputs: in, with what pads it.
        tiles: how many.
        in_halves: whether a tile is half gate and half up.

    """
    weight = weight.contiguous()
    packed = torch.empty(tiles * inputs * TILE, dtype=weight.dtype)
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (weight, packed))
    sizes = (ctypes.c_int64(n) for n in (*weight.shape, inputs, tiles))
    load_kernels().pack_tiles(weight.dtype.itemsize, int(in_halves), *pointers, *sizes)
    return packed
