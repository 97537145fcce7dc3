"""Routed experts' weights and their maths: used by the workers, and by the router's in-process implementation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from shared.checkpoint import Checkpoint
from shared.checkpoint.names import expert_names
from shared.kernels.experts import CompiledExperts
from shared.linear import LEAST_ROWS, Linear
from shared.pruning import kept_channels, prune
from shared.quantization import Int8Linear, quantize_rows
from shared.tensors import TensorReader

Activation = Callable[[torch.Tensor], torch.Tensor]

ACTIVATION: dict[str, Activation] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": lambda x: F.gelu(x.contiguous()),  # has two kernels, and a single row of a larger matrix is contiguous
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
GROUP_ROWS = 64
"""Experts are taken together until they have so many rows: enough to share small operations, few enough for caches."""
SERIAL_ELEMENTS = 16384
"""Torch splits larger activations among threads, wherever in a row that falls, and rounds there otherwise. Source:
ATen's GELU_MIN_ELEMENTS_FOR_MULTI_THREADING; its GRAIN_SIZE for the others is larger."""


def shard_experts(num_experts: int, num_shards: int, shard: int) -> range:
    """The experts of `shard`: expert e belongs to shard e mod S."""
    return range(shard, num_experts, num_shards)


@dataclass(frozen=True)
class ExpertWeights:
    """One expert: a gated feed-forward network (SwiGLU, arXiv 2002.05202)."""

    gate_up: Linear | Int8Linear
    """[2I, H]: gate's rows, then up's."""
    down: Linear | Int8Linear
    """[H, I]"""


@dataclass(frozen=True)
class ExpertOptions:
    """How experts are kept and computed; docs/decisions/0011-expert-weights.md says why."""

    widen: bool = False
    """Keep bfloat16 weights as float32, and compute in it."""
    quantization: Literal["none", "8bit"] = "none"
    """8bit: keep weights as int8."""
    sparsity: float = 0.0
    """The share of each expert's channels that is left out."""
    compiled: bool = False
    """Compute with the kernel in shared/kernels."""


@dataclass(frozen=True)
class Span:
    """The pairs of one expert, among all pairs sorted by expert."""

    expert: int
    start: int
    stop: int


class ExpertBank:
    """The weights of some experts of every MoE layer, and their weighted sum."""

    def __init__(
        self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device, options: ExpertOptions | None = None
    ) -> None:
        config = checkpoint.config
        options = options or ExpertOptions()
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self._int8 = options.quantization == "8bit"
        self._inner = kept_channels(config.moe_intermediate_size, options.sparsity)
        self._widen = options.widen and dtype is torch.bfloat16 and not self._int8 and not options.compiled
        self._compute_dtype = torch.float32 if self._widen else dtype
        self._act = ACTIVATION[config.hidden_act]
        self._weights: dict[tuple[int, int], ExpertWeights] = {}
        self._loaded: set[tuple[int, int]] = set()
        self._compiled: CompiledExperts | None = None
        if options.compiled:
            self._compiled = CompiledExperts(
                hidden=config.hidden_size,
                inner=self._inner,
                num_experts=config.num_experts,
                activation=config.hidden_act,
                dtype=torch.int8 if self._int8 else dtype,
            )
        self.config = config

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def _expert_bytes(self) -> int:
        """Of one expert of one layer, as it is kept."""
        if self._compiled:
            return self._compiled.expert_bytes
        hidden = self.config.hidden_size
        if self._int8:
            return 3 * self._inner * hidden + (2 * self._inner + hidden) * torch.bfloat16.itemsize
        return 3 * self._inner * hidden * self._compute_dtype.itemsize

    def bytes_of(self, experts: Iterable[int], *, num_layers: int | None = None) -> int:
        """Bytes that these experts' weights take in memory, in so many layers or all of them."""
        layers = len(self.config.moe_layers) if num_layers is None else num_layers
        return self._expert_bytes * layers * len(list(experts))

    def load(
        self,
        experts: Iterable[int],
        on_bytes: Callable[[int], None] = lambda _: None,
        layers: Sequence[int] | None = None,
    ) -> None:
        """Read the tensors of `experts`, one after another; gate and up become one matrix.

        Args:
            experts: which; what is there already is not read again.
            on_bytes: called with the bytes that each expert of a layer takes in memory, once it is there.
            layers: indices of the layers in which; None: every MoE layer.

        Raises:
            CheckpointError: a tensor is missing, of another shape, or unreadable.

        """
        c = self.config
        wanted = sorted(experts)
        # Every expert is read into the same memory: holes between what stays would add up to as much again.
        gate_up = torch.empty(2 * c.moe_intermediate_size, c.hidden_size, dtype=self._dtype, device=self._device)
        down = torch.empty(c.hidden_size, c.moe_intermediate_size, dtype=self._dtype, device=self._device)
        wide = [torch.empty_like(w, dtype=torch.float32) for w in (gate_up, down)] if self._widen else []
        with TensorReader(self._checkpoint.tensors, self._device, lambda _: None) as reader:
            for layer in c.moe_layers if layers is None else layers:
                for expert in wanted:
                    if (layer, expert) not in self._loaded:
                        self._read(reader, layer, expert, gate_up, down)
                        matrices = (
                            [w.copy_(n) for w, n in zip(wide, (gate_up, down), strict=True)]
                            if wide
                            else [gate_up, down]
                        )
                        self._keep(layer, expert, *matrices)
                        self._loaded.add((layer, expert))
                        on_bytes(self._expert_bytes)

    def drop(self, keys: Iterable[tuple[int, int]]) -> None:
        """Give up the weights of these (layer, expert); nobody may be computing with them."""
        for key in keys:
            self._loaded.discard(key)
            self._weights.pop(key, None)
            if self._compiled:
                self._compiled.remove(*key)

    def _keep(self, layer: int, expert: int, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        """Prune, quantize and lay out one expert, given as [2I, H] and [H, I], which are written to again later."""
        if self._inner < down.shape[1]:
            gate_up, down = prune(gate_up, down, self._inner)
        if self._int8:
            (gate_up, gate_up_scale), (down, down_scale) = quantize_rows(gate_up), quantize_rows(down)
            if self._compiled:
                self._compiled.add(layer, expert, gate_up, down, (gate_up_scale, down_scale))
            else:
                linears = Int8Linear(gate_up, gate_up_scale), Int8Linear(down, down_scale)
                self._weights[layer, expert] = ExpertWeights(*linears)
        elif self._compiled:
            self._compiled.add(layer, expert, gate_up, down)
        else:
            kept = (w if Linear.packs(w) else w.clone() for w in (gate_up, down))
            self._weights[layer, expert] = ExpertWeights(*(Linear(w) for w in kept))

    def _read(self, reader: TensorReader, layer: int, expert: int, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        """One expert's matrices into `gate_up` [2I, H] and `down` [H, I]."""
        c = self.config
        inner = c.moe_intermediate_size
        names = expert_names(c, self._checkpoint.tensors, layer, expert)
        if names.row is None:
            reader.copy_into(gate_up[:inner], names.gate)
            reader.copy_into(gate_up[inner:], names.up)
            reader.copy_into(down, names.down)
        else:
            reader.copy_into(gate_up, names.gate, stored=(c.num_experts, *gate_up.shape), row=names.row)
            reader.copy_into(down, names.down, stored=(c.num_experts, *down.shape), row=names.row)

    def has(self, layer: int, expert: int) -> bool:
        return (layer, expert) in self._loaded

    def compute(
        self,
        layer: int,
        hidden: torch.Tensor,
        token_index: torch.Tensor,
        expert_index: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """The weighted sum of each token's experts, added up in ascending order of experts.

        A token's result does not depend on the other tokens and pairs of the call, to the bit.

        Args:
            layer: the layer's index in the model.
            hidden: [T, H].
            token_index: [P] int, row of `hidden` of each pair.
            expert_index: [P] int, expert of each pair; all of them must be loaded.
            weights: [P] float32.

        Returns:
            [T, H] in `hidden`'s dtype; sums are kept in float32.

        """
        if self._compiled:
            return self._compiled.compute(layer, hidden, token_index, expert_index, weights).to(hidden.dtype)
        out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        if not expert_index.numel():
            return out.to(hidden.dtype)
        order = torch.argsort(expert_index, stable=True)
        tokens, scales = token_index[order], weights[order].unsqueeze(1)  # [P], [P, 1]
        x = hidden.to(self._compute_dtype)
        for group in _groups(torch.bincount(expert_index).tolist()):
            pairs = slice(group[0].start, group[-1].stop)
            rows = tokens[pairs]  # [n]
            y = self._run(layer, group, x.index_select(0, rows))  # [n, H]
            out.index_add_(0, rows, y.float().mul_(scales[pairs]))
        return out.to(hidden.dtype)

    def _run(self, layer: int, group: list[Span], x: torch.Tensor) -> torch.Tensor:
        """Each row of `x` [n, H] through its expert: [n, H]."""
        experts = [self._weights[layer, span.expert] for span in group]
        gate_up = _products([w.gate_up for w in experts], group, x)  # [n, 2I]
        inner = gate_up.shape[1] // 2
        h = torch.empty(x.shape[0], inner, dtype=x.dtype, device=x.device)  # [n, I]
        most = max(1, SERIAL_ELEMENTS // inner)
        for piece in range(0, x.shape[0], most):
            part = slice(piece, piece + most)
            torch.mul(self._act(gate_up[part, :inner]), gate_up[part, inner:], out=h[part])
        return _products([w.down for w in experts], group, h)


def _groups(counts: list[int]) -> Iterator[list[Span]]:
    """Experts with pairs, in order, as lists of about GROUP_ROWS rows; `counts` has the pairs of each expert."""
    group: list[Span] = []
    start = 0
    for expert, count in enumerate(counts):
        if count:
            group.append(Span(expert, start, start + count))
            start += count
            if start - group[0].start >= GROUP_ROWS:
                yield group
                group = []
    if group:
        yield group


def _products(linears: list[Linear | Int8Linear], group: list[Span], x: torch.Tensor) -> torch.Tensor:
    """Each expert's rows of `x` [n, in] times its weight: [n, out].

    A single row takes a neighbour along, which costs less than padding it.
    """
    first, rows = group[0].start, x.shape[0]
    if len(group) == 1:
        return linears[0](x)
    parts = []
    for linear, span in zip(linears, group, strict=True):
        start, stop = span.start - first, span.stop - first
        begin = min(start, max(0, rows - LEAST_ROWS))
        end = max(stop, min(rows, begin + LEAST_ROWS))
        y = linear(x[begin:end])
        parts.append(y if end - begin == stop - start else y[start - begin : stop - begin])
    return torch.cat(parts)
