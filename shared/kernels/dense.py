"""The compiled dense part: matrices as the kernel reads them, and what its calls are given."""

from __future__ import annotations

import ctypes

import torch

from shared.compute import most_threads
from shared.kernels.build import load_kernels
from shared.kernels.tiles import TILE, pack, whole

LANES = 16
"""Of the kernel: values of the KV cache are padded to so many."""
MOST_HEAD_DIM = 512
"""Of the kernel."""
DTYPES = (torch.float32, torch.bfloat16)


class Matrix(ctypes.Structure):
    _fields_ = [(n, ctypes.c_void_p) for n in ("weights", "bias")] + [
        (n, ctypes.c_int64) for n in ("inputs", "outputs")
    ]


class Shape(ctypes.Structure):
    """Of every layer; `norm_of_heads`: 0 none, 1 each head by itself, 2 all heads together; `clip`: 0 for none."""

    _fields_ = [
        *((n, ctypes.c_int64) for n in ("hidden", "heads", "kv_heads", "dim", "experts", "top_k")),
        *((n, ctypes.c_int32) for n in ("itemsize", "norm_of_heads", "normalize", "round_weights")),
        *((n, ctypes.c_float) for n in ("epsilon", "clip")),
    ]


class Layer(ctypes.Structure):
    """`window`: positions that a row sees, itself included; 0: all."""

    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("input_norm", "query_norm", "key_norm", "post_norm")),
        *((n, Matrix) for n in ("qkv", "output", "gate")),
        ("window", ctypes.c_int64),
    ]


class Sequence(ctypes.Structure):
    """Rows [row, row + count) are its positions from `start` on; `tiles`: int32, where each 64 positions are kept."""

    _fields_ = [*((n, ctypes.c_int64) for n in ("row", "count", "start")), ("tiles", ctypes.c_void_p)]


class Step(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_int64) for n in ("rows", "num_sequences")),
        *((n, ctypes.c_void_p) for n in ("sequences", "slots", "cos", "sin")),
    ]


class CompiledMatrix:
    """`x` [T, in] times a weight [out, in], plus a bias [out]: [T, out] float32, whatever x's dtype is.

    A row's result does not depend on the other rows. The weight is read as it is stored.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Copy `weight` [out, in] and `bias` [out], of one of DTYPES.

        Raises:
            StartError: no compiler.

        """
        self._library = load_kernels()
        self._itemsize = weight.dtype.itemsize
        self._outputs, inputs = weight.shape
        self._packed = pack(weight, inputs=inputs, tiles=whole(self._outputs, TILE) // TILE)
        self._bias = None if bias is None else bias.float()
        bias_pointer = None if self._bias is None else self._bias.data_ptr()
        self.entry = Matrix(self._packed.data_ptr(), bias_pointer, inputs, self._outputs)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float().contiguous()
        out = torch.empty(x.shape[0], self._outputs)
        self._library.dense_product(
            ctypes.byref(self.entry),
            self._itemsize,
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_int64(x.shape[0]),
            ctypes.c_void_p(out.data_ptr()),
            most_threads(),
        )
        return out
