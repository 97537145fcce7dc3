"""The compiled experts: their weights as the kernel reads them, and its calls."""

from __future__ import annotations

import ctypes
import threading

import torch

from shared.kernels.build import load_kernels
from shared.kernels.tiles import HALF, TILE, pack, whole

ACTIVATIONS = {"silu": 0, "swish": 0, "gelu": 1, "gelu_new": 2, "gelu_pytorch_tanh": 2, "relu": 3}
DTYPES = (torch.float32, torch.bfloat16, torch.int8)

_one_at_a_time = threading.Lock()
"""The kernel has one scratch memory and one set of threads per process."""


class _Expert(ctypes.Structure):
    _fields_ = [(n, ctypes.c_void_p) for n in ("gate_up", "gate_up_scale", "down", "down_scale")]


class CompiledExperts:
    """Experts of all layers; everything is computed in float32, whatever the weights are."""

    def __init__(self, *, hidden: int, inner: int, num_experts: int, activation: str, dtype: torch.dtype) -> None:
        """Compile, or take what was compiled before.

        Args:
            hidden: H.
            inner: I.
            num_experts: of a layer.
            activation: its name in config.json.
            dtype: of the weights, one of DTYPES.

        Raises:
            StartError: no compiler.

        """
        self._library = load_kernels()
        self._hidden, self._inner, self._num_experts = hidden, inner, num_experts
        self._activation = ACTIVATIONS[activation]
        self._dtype = dtype
        self._outputs, self._padded_inner = whole(hidden, TILE), whole(inner, HALF)
        self._tables: dict[int, ctypes.Array[_Expert]] = {}
        self._kept: dict[tuple[int, int], list[torch.Tensor]] = {}

    @property
    def expert_bytes(self) -> int:
        """Of one expert's weights in memory, with what pads them."""
        gate_up, down = 2 * self._padded_inner * self._hidden, self._outputs * self._padded_inner
        scales = 4 * (2 * self._padded_inner + self._outputs) if self._dtype is torch.int8 else 0
        return (gate_up + down) * self._dtype.itemsize + scales

    def add(
        self,
        layer: int,
        expert: int,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Take one expert's weights, which are copied.

        Args:
            layer: the layer's index in the model.
            expert: which of its experts.
            gate_up: [2I, H], gate's rows, then up's.
            down: [H, I].
            scales: [2I] and [H] float32, if the weights are int8.

        """
        packed = (
            pack(gate_up, inputs=self._hidden, tiles=self._padded_inner // HALF, in_halves=True),
            pack(down, inputs=self._padded_inner, tiles=self._outputs // TILE),
        )
        entry = _Expert(packed[0].data_ptr(), None, packed[1].data_ptr(), None)
        kept = [*packed]
        if scales is not None:
            gate, up = torch.zeros(2, self._padded_inner)
            gate[: self._inner], up[: self._inner] = scales[0].chunk(2)
            gate_up_scale = torch.cat((gate.view(-1, HALF), up.view(-1, HALF)), dim=1).contiguous()
            down_scale = torch.zeros(self._outputs)
            down_scale[: self._hidden] = scales[1]
            entry.gate_up_scale, entry.down_scale = gate_up_scale.data_ptr(), down_scale.data_ptr()
            kept += (gate_up_scale, down_scale)
        self._kept[layer, expert] = kept
        table = self._tables.setdefault(layer, (_Expert * self._num_experts)())
        table[expert] = entry

    def remove(self, layer: int, expert: int) -> None:
        """Give up one expert's weights, if they are there; nobody may be computing with them."""
        if self._kept.pop((layer, expert), None) is not None:
            self._tables[layer][expert] = _Expert()

    def compute(
        self,
        layer: int,
        hidden: torch.Tensor,
        token_index: torch.Tensor,
        expert_index: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """As `ExpertBank.compute`, but [T, H] float32 whatever `hidden`'s dtype is.

        Raises:
            ValueError: a pair names a token or an expert that is not there.

        """
        x = hidden.float().contiguous()
        token_index, expert_index = token_index.int().contiguous(), expert_index.int().contiguous()
        weights = weights.contiguous()
        out = torch.empty(x.shape)
        with _one_at_a_time:
            wrong = self._library.moe_forward(
                self._tables[layer],
                ctypes.c_int64(self._num_experts),
                self._dtype.itemsize,
                self._activation,
                *(ctypes.c_int64(n) for n in (self._hidden, self._outputs, self._padded_inner)),
                ctypes.c_void_p(x.data_ptr()),
                ctypes.c_int64(x.shape[0]),
                *(ctypes.c_void_p(t.data_ptr()) for t in (token_index, expert_index, weights)),
                ctypes.c_int64(len(weights)),
                ctypes.c_void_p(out.data_ptr()),
                torch.get_num_threads(),
            )
        if wrong:
            raise ValueError("a pair names a token or an expert that is not there")
        return out
