"""The model's dense part: embeddings, norms, attention, gates, shared experts, LM head. No routed expert is here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from services.router.attention import attend, working_dtype
from services.router.batch import Batch
from services.router.kv_cache import KVCache
from services.router.rope import RotaryEmbedding, rotate
from shared.checkpoint import Checkpoint, ModelConfig
from shared.checkpoint.names import PREFIX, moe_prefix
from shared.compute import all_threads, one_thread
from shared.experts import ACTIVATION
from shared.linear import Linear
from shared.tensors import TensorReader

Weights = dict[str, torch.Tensor]
Matrix = Callable[[torch.Tensor], torch.Tensor]
"""`x` [T, in] to [T, out]."""
GATE_PROJ = "gate_proj.weight"
LARGE_ELEMENTS = 4_000_000
"""From so many weights on a product is worth all threads."""


@dataclass(frozen=True)
class Routing:
    """What a MoE layer's experts are asked."""

    hidden: torch.Tensor
    """[T, H], normed."""
    top_k_index: torch.Tensor
    """[T, k] int64."""
    top_k_weights: torch.Tensor
    """[T, k] float32."""


class Step(Protocol):
    """A batch on its way through the layers."""

    hidden: torch.Tensor
    """[T, H]: the tokens' embeddings."""

    def attention(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden [T, H] plus the layer's attention [T, H]; writes the rows' keys and values to the cache.

        `hidden` may be written over.
        """
        ...


@dataclass
class TorchStep:
    """With the rotations of its rows, cos and sin [T, 1, D]."""

    model: DenseModel
    batch: Batch
    hidden: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    def attention(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.attend(layer, hidden, self.batch, self.cos, self.sin)


def weight_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Every dense tensor of the model, by its name in the checkpoint."""
    c = checkpoint.config
    hidden, q_size, kv_size = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (c.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, hidden)
    for layer in range(c.num_hidden_layers):
        p = PREFIX.format(layer=layer)
        shapes[f"{p}input_layernorm.weight"] = (hidden,)
        shapes[f"{p}post_attention_layernorm.weight"] = (hidden,)
        for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
            shapes[f"{p}self_attn.{name}_proj.weight"] = (size, hidden)
            if c.qkv_bias:
                shapes[f"{p}self_attn.{name}_proj.bias"] = (size,)
        shapes[f"{p}self_attn.o_proj.weight"] = (hidden, q_size)
        if c.output_bias:
            shapes[f"{p}self_attn.o_proj.bias"] = (hidden,)
        if c.qk_norm != "none":
            whole = c.qk_norm == "whole"
            shapes[f"{p}self_attn.q_norm.weight"] = (q_size if whole else c.head_dim,)
            shapes[f"{p}self_attn.k_norm.weight"] = (kv_size if whole else c.head_dim,)
        if layer in c.moe_layers:
            shapes[f"{moe_prefix(c, checkpoint.tensors, layer)}gate.weight"] = (c.num_experts, hidden)
            if c.shared_expert_intermediate_size:
                shapes[f"{p}mlp.shared_expert_gate.weight"] = (1, hidden)
                shapes |= _mlp_shapes(f"{p}mlp.shared_expert.", c.shared_expert_intermediate_size, hidden)
        else:
            shapes |= _mlp_shapes(f"{p}mlp.", c.intermediate_size, hidden)
    return shapes


def _mlp_shapes(prefix: str, inner: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}gate_proj.weight": (inner, hidden),
        f"{prefix}up_proj.weight": (inner, hidden),
        f"{prefix}down_proj.weight": (hidden, inner),
    }


class DenseModel:
    """The dense forward pass of one model, layer by layer, between which the routed experts are asked.

    Takes `weights` over: a matrix is let go as soon as it is packed.
    """

    def __init__(self, config: ModelConfig, weights: Weights, gates: dict[int, torch.Tensor]) -> None:
        self.config = config
        embeddings = weights["model.embed_tokens.weight"]
        self._linears: dict[str, Matrix] = {}
        for name in [n for n, weight in weights.items() if weight.dim() == 2 and weight is not embeddings]:
            stem = name.removesuffix(".weight")
            self._linears[stem] = self._matrix(weights.pop(name), weights.pop(f"{stem}.bias", None))
        self._gates = {layer: self._matrix(gate) for layer, gate in gates.items()}
        self._vectors = weights
        self._embeddings = embeddings
        self._act = ACTIVATION[config.hidden_act]
        self.device, self.dtype = embeddings.device, embeddings.dtype
        self.rope = RotaryEmbedding(config, self.device)
        self._lm_head = self._matrix(embeddings) if config.tie_word_embeddings else self._linears["lm_head"]

    def _matrix(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Matrix:
        # On a CPU without bfloat16 of its own the dense part is kept in float32: it is small beside the experts.
        return Linear(weight, bias, widen=True)

    @staticmethod
    def block_bytes(config: ModelConfig, block_tokens: int, dtype: torch.dtype, device: torch.device) -> int:
        """Bytes of one block of the KV cache, all layers, for a model of `dtype`."""
        position = 2 * config.head_dim * working_dtype(dtype, device).itemsize
        return config.num_hidden_layers * block_tokens * config.num_key_value_heads * position

    def allocate_cache(self, blocks: int, block_tokens: int) -> None:
        """Make the KV cache, of `blocks` blocks beside block 0."""
        dtype = working_dtype(self.dtype, self.device)
        self._cache = KVCache(self.config, blocks, block_tokens, dtype, self.device)

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, on_bytes: Callable[[int], None]
    ) -> DenseModel:
        """Read the dense tensors only; each is copied and its file's mapping dropped.

        Raises:
            CheckpointError: a tensor is missing, of another shape, or unreadable.

        """
        shapes = weight_shapes(checkpoint)
        for name, shape in shapes.items():
            checkpoint.tensors.expect(name, shape)
        with TensorReader(checkpoint.tensors, device, on_bytes) as reader:
            by_file = sorted(shapes, key=lambda name: str(checkpoint.tensors.entries[name].file))
            weights = {name: reader.read(name, shapes[name], dtype) for name in by_file}
        for name in [name for name in weights if name.endswith(GATE_PROJ)]:
            prefix = name.removesuffix(GATE_PROJ)
            up = weights.pop(f"{prefix}up_proj.weight")
            weights[f"{prefix}gate_up_proj.weight"] = torch.cat([weights.pop(name), up])
        for layer in range(checkpoint.config.num_hidden_layers):
            p = f"{PREFIX.format(layer=layer)}self_attn."
            for kind in ("weight", "bias") if checkpoint.config.qkv_bias else ("weight",):
                weights[f"{p}qkv_proj.{kind}"] = torch.cat([weights.pop(f"{p}{name}_proj.{kind}") for name in "qkv"])
        c = checkpoint.config
        gates = {layer: weights.pop(f"{moe_prefix(c, checkpoint.tensors, layer)}gate.weight") for layer in c.moe_layers}
        return cls(c, weights, gates)

    @staticmethod
    def load_bytes(checkpoint: Checkpoint, itemsize: int) -> int:
        """Bytes of the dense weights in memory."""
        total = 0
        for shape in weight_shapes(checkpoint).values():
            size = itemsize
            for dimension in shape:
                size *= dimension
            total += size
        return total

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """RMSNorm (arXiv 1910.07467) in float32, as the reference computes it."""
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return self._vectors[name] * y.to(x.dtype)

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return self._linears[name](x)

    def _mlp(self, x: torch.Tensor, prefix: str) -> torch.Tensor:
        # As one matrix, like an expert's: one product instead of two, and the activation then runs row by row.
        gate, up = self._linear(x, f"{prefix}gate_up_proj").chunk(2, dim=-1)
        with one_thread():
            h = self._act(gate) * up
        return self._linear(h, f"{prefix}down_proj")

    def begin(self, batch: Batch) -> Step:
        """The batch's way through the layers."""
        cos, sin = self.rope(batch.positions, batch.rope_lengths)
        hidden = F.embedding(batch.token_ids, self._embeddings)
        return TorchStep(self, batch, hidden, cos.to(self.dtype), sin.to(self.dtype))

    def attend(
        self, layer: int, hidden: torch.Tensor, batch: Batch, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """`hidden` [T, H] plus the layer's attention, for rotations cos and sin [T, 1, D]."""
        c, cache = self.config, self._cache
        p = f"{PREFIX.format(layer=layer)}self_attn."
        x = self._norm(hidden, f"{PREFIX.format(layer=layer)}input_layernorm.weight")
        q_size, kv_size = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        q, k, v = torch.split(self._linear(x, f"{p}qkv_proj"), [q_size, kv_size, kv_size], dim=-1)
        if c.qk_norm == "whole":
            q, k = self._norm(q, f"{p}q_norm.weight"), self._norm(k, f"{p}k_norm.weight")
        if c.clip_qkv is not None:
            q, k, v = (each.clamp(-c.clip_qkv, c.clip_qkv) for each in (q, k, v))
        q = q.reshape(-1, c.num_attention_heads, c.head_dim)
        k = k.reshape(-1, c.num_key_value_heads, c.head_dim)
        v = v.reshape(-1, c.num_key_value_heads, c.head_dim)
        if c.qk_norm == "head":
            q, k = self._norm(q, f"{p}q_norm.weight"), self._norm(k, f"{p}k_norm.weight")
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        cache.write(layer, batch.slots, k, v)
        y = attend(q, cache.keys[layer], cache.values[layer], batch, c.sliding_windows[layer])
        return hidden + self._linear(y, f"{p}o_proj")

    def route(self, layer: int, hidden: torch.Tensor) -> Routing:
        """Norm `hidden` [T, H] and pick each token's top-k experts."""
        return self.gate(layer, self._norm(hidden, f"{PREFIX.format(layer=layer)}post_attention_layernorm.weight"))

    def gate(self, layer: int, normed: torch.Tensor) -> Routing:
        """The gate's choice for `normed` [T, H]: softmax in float32, top-k, renormalised where the model says so."""
        c = self.config
        logits = self._gates[layer](normed)  # [T, E]
        weights, index = torch.topk(F.softmax(logits, dim=-1, dtype=torch.float32), c.num_experts_per_tok, dim=-1)
        if c.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        if c.family != "mixtral":  # all but Mixtral round the weights to the model's dtype
            weights = weights.to(logits.dtype).float()
        return Routing(normed, index, weights)

    def shared_expert(self, layer: int, normed: torch.Tensor) -> torch.Tensor | None:
        """The shared expert's gated output [T, H]; None where the model has none."""
        if not self.config.shared_expert_intermediate_size:
            return None
        p = f"{PREFIX.format(layer=layer)}mlp."
        out = self._mlp(normed, f"{p}shared_expert.")
        gate = self._linear(normed, f"{p}shared_expert_gate")  # [T, 1]
        # Over whole rows: elementwise kernels treat the end of a column of T numbers differently from its middle.
        with one_thread():
            return F.sigmoid(gate.expand_as(out)) * out

    def dense_mlp(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden [T, H] plus the dense MLP of a layer without experts."""
        p = PREFIX.format(layer=layer)
        return hidden + self._mlp(self._norm(hidden, f"{p}post_attention_layernorm.weight"), f"{p}mlp.")

    def logits(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Float32 logits [R, V] of the rows [R] of `hidden` [T, H]."""
        normed = self._norm(hidden[rows], "model.norm.weight")
        large = self.config.vocab_size * self.config.hidden_size >= LARGE_ELEMENTS
        with all_threads() if large else contextlib.nullcontext():  # the layers are done: no worker computes for us now
            return self._lm_head(normed).float()
