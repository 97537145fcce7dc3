"""Routed experts' weights and their maths: used by the workers, and by the router's in-process implementation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from shared.checkpoint import Checkpoint
from shared.checkpoint.names import expert_names
from shared.linear import Linear
from shared.tensors import TensorReader

Activation = Callable[[torch.Tensor], torch.Tensor]

ACTIVATION: dict[str, Activation] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def shard_experts(num_experts: int, num_shards: int, shard: int) -> range:
    """The experts of `shard`: expert e belongs to shard e mod S."""
    return range(shard, num_experts, num_shards)


@dataclass(frozen=True)
class ExpertWeights:
    """One expert: a gated feed-forward network (SwiGLU, arXiv 2002.05202)."""

    gate_up: Linear
    """[2I, H]: gate's rows, then up's."""
    down: Linear
    """[H, I]"""


class ExpertBank:
    """The weights of some experts of every MoE layer, and their weighted sum."""

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> None:
        config = checkpoint.config
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self._act = ACTIVATION[config.hidden_act]
        self._weights: dict[tuple[int, int], ExpertWeights] = {}
        self.config = config

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def bytes_of(self, experts: Iterable[int]) -> int:
        """Bytes that these experts' weights take in memory, all layers together."""
        c = self.config
        itemsize = torch.empty(0, dtype=self._dtype).element_size()
        per_expert = 3 * c.moe_intermediate_size * c.hidden_size * itemsize
        return per_expert * len(c.moe_layers) * len(list(experts))

    def load(self, experts: Iterable[int], on_bytes: Callable[[int], None] = lambda _: None) -> None:
        """Read the tensors of `experts` in every MoE layer; gate and up become one matrix.

        Raises:
            CheckpointError: a tensor is missing, of another shape, or unreadable.

        """
        c = self.config
        inner, hidden = c.moe_intermediate_size, c.hidden_size
        wanted = sorted(experts)
        with TensorReader(self._checkpoint.tensors, self._device, on_bytes) as reader:
            for layer in c.moe_layers:
                for expert in wanted:
                    if (layer, expert) in self._weights:
                        continue
                    names = expert_names(c, self._checkpoint.tensors, layer, expert)
                    gate_up = torch.empty(2 * inner, hidden, dtype=self._dtype, device=self._device)
                    down = torch.empty(hidden, inner, dtype=self._dtype, device=self._device)
                    if names.row is None:
                        reader.copy_into(gate_up[:inner], names.gate)
                        reader.copy_into(gate_up[inner:], names.up)
                        reader.copy_into(down, names.down)
                    else:
                        stacked = (c.num_experts, *gate_up.shape)
                        reader.copy_into(gate_up, names.gate, stored=stacked, row=names.row)
                        stacked = (c.num_experts, *down.shape)
                        reader.copy_into(down, names.down, stored=stacked, row=names.row)
                    self._weights[layer, expert] = ExpertWeights(Linear(gate_up), Linear(down))

    def has(self, layer: int, expert: int) -> bool:
        return (layer, expert) in self._weights

    def compute(
        self,
        layer: int,
        hidden: torch.Tensor,
        token_index: torch.Tensor,
        expert_index: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """The weighted sum of each token's experts.

        Args:
            layer: the layer's index in the model.
            hidden: [T, H].
            token_index: [P] int, row of `hidden` of each pair.
            expert_index: [P] int, expert of each pair; all of them must be loaded.
            weights: [P] float32.

        Returns:
            [T, H] in `hidden`'s dtype; sums are kept in float32.

        """
        out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        order = torch.argsort(expert_index, stable=True)
        token_index, weights = token_index[order], weights[order].unsqueeze(1)  # [P], [P, 1]
        present, counts = torch.unique_consecutive(expert_index[order], return_counts=True)
        start = 0
        for expert, count in zip(present.tolist(), counts.tolist(), strict=True):
            w = self._weights[layer, expert]
            rows = token_index[start : start + count]  # [n]
            x = hidden if count == hidden.shape[0] == 1 else hidden[rows]  # [n, H]
            gate, up = w.gate_up(x).chunk(2, dim=-1)  # [n, I] each
            y = w.down(self._act(gate) * up)  # [n, H]
            out.index_add_(0, rows, y.float() * weights[start : start + count])
            start += count
        return out.to(hidden.dtype)
