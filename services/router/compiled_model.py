"""The dense part by our own kernel: a call for a layer's attention and one for its gate, in place of sixty small ones.

Hidden states are float32 between the layers, whatever the model's dtype; what the experts are sent has that dtype.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
import torch.nn.functional as F

from services.router.batch import Batch
from services.router.kv_cache import zeros
from services.router.model import DenseModel, Matrix, Routing, Weights
from shared.checkpoint import ModelConfig
from shared.checkpoint.names import PREFIX
from shared.compute import most_threads
from shared.kernels.build import load_kernels
from shared.kernels.dense import LANES, CompiledMatrix, Layer, Sequence, Shape, Step
from shared.kernels.tiles import TILE, whole

NORM_OF_HEADS = {"none": 0, "head": 1, "whole": 2}


class CompiledKVCache:
    """Keys and values of every layer in tiles of 64 positions, float32.

    A tile of keys is [kv_heads, head_dim, 64], one of values [kv_heads, 64, padded head_dim]: as the kernel reads a
    tile of weights. Block b's positions are the tiles from b × block_tokens / 64 on.
    """

    def __init__(self, config: ModelConfig, blocks: int, block_tokens: int) -> None:
        tiles = (blocks + 1) * block_tokens // TILE
        dim = whole(config.head_dim, LANES)
        device = torch.device("cpu")
        keys, values = (tiles, config.num_key_value_heads, config.head_dim, TILE), (tiles, config.num_key_value_heads)
        self.keys = [zeros(keys, torch.float32, device) for _ in range(config.num_hidden_layers)]
        self.values = [zeros((*values, TILE, dim), torch.float32, device) for _ in range(config.num_hidden_layers)]


class CompiledStep:
    """A batch as the kernel is given it."""

    def __init__(self, model: CompiledModel, batch: Batch, hidden: torch.Tensor) -> None:
        self.hidden = hidden
        self._model = model
        cos, sin = model.rope(batch.positions, batch.rope_lengths)
        blocks = np.array([block for span in batch.spans for block in span.blocks], dtype=np.int64)
        each = batch.block_tokens // TILE
        tiles = (blocks[:, None] * each + np.arange(each)).astype(np.int32).ravel()
        sequences = (Sequence * len(batch.spans))()
        row, at = 0, tiles.ctypes.data
        for sequence, span in zip(sequences, batch.spans, strict=True):
            count = len(span.token_ids)
            sequence.row, sequence.count, sequence.start, sequence.tiles = row, count, span.start, at
            row += count
            at += len(span.blocks) * each * tiles.itemsize
        self._kept = (batch, cos, sin, tiles, sequences)  # what is pointed to
        self._entry = Step(
            rows=batch.size,
            num_sequences=len(batch.spans),
            sequences=ctypes.addressof(sequences),
            slots=batch.slots.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
        )

    def attention(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """As TorchStep's; `hidden` [T, H] float32 is written over."""
        self._model.add_attention(layer, hidden, self._entry)
        return hidden


class CompiledModel(DenseModel):
    """As DenseModel."""

    def __init__(self, config: ModelConfig, weights: Weights, gates: dict[int, torch.Tensor]) -> None:
        super().__init__(config, weights, gates)
        self._library = load_kernels()
        self._vectors = {name: vector.float() for name, vector in self._vectors.items() if vector.dim() == 1}
        rounds = config.family != "mixtral" and self.dtype is torch.bfloat16
        self._shape = Shape(
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            dim=config.head_dim,
            experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            itemsize=self.dtype.itemsize,
            norm_of_heads=NORM_OF_HEADS[config.qk_norm],
            normalize=config.norm_topk_prob,
            round_weights=rounds,
            epsilon=config.rms_norm_eps,
            clip=config.clip_qkv or 0.0,
        )
        self._layers = [self._layer(layer) for layer in range(config.num_hidden_layers)]

    def _matrix(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> CompiledMatrix:
        return CompiledMatrix(weight, bias)

    def _layer(self, layer: int) -> Layer:
        p = PREFIX.format(layer=layer)

        def vector(name: str) -> int | None:
            found = self._vectors.get(f"{p}{name}.weight")
            return None if found is None else found.data_ptr()

        entry = Layer(
            input_norm=vector("input_layernorm"),
            query_norm=vector("self_attn.q_norm"),
            key_norm=vector("self_attn.k_norm"),
            post_norm=vector("post_attention_layernorm"),
            qkv=self._compiled(self._linears[f"{p}self_attn.qkv_proj"]).entry,
            output=self._compiled(self._linears[f"{p}self_attn.o_proj"]).entry,
            window=self.config.sliding_windows[layer] or 0,
        )
        if layer in self._gates:
            entry.gate = self._compiled(self._gates[layer]).entry
        return entry

    def _compiled(self, matrix: Matrix) -> CompiledMatrix:
        assert isinstance(matrix, CompiledMatrix)  # noqa: S101 - `_matrix` made it
        return matrix

    @staticmethod
    def block_bytes(
        config: ModelConfig,
        block_tokens: int,
        dtype: torch.dtype,  # noqa: ARG004 - whatever it is
        device: torch.device,  # noqa: ARG004
    ) -> int:
        position = (config.head_dim + whole(config.head_dim, LANES)) * torch.float32.itemsize
        return config.num_hidden_layers * block_tokens * config.num_key_value_heads * position

    def allocate_cache(self, blocks: int, block_tokens: int) -> None:
        self._tiles = CompiledKVCache(self.config, blocks, block_tokens)

    def begin(self, batch: Batch) -> CompiledStep:
        return CompiledStep(self, batch, F.embedding(batch.token_ids, self._embeddings).float())

    def add_attention(self, layer: int, hidden: torch.Tensor, step: Step) -> None:
        """Add the layer's attention to `hidden` [T, H] float32."""
        self._library.dense_attention(
            ctypes.byref(self._shape),
            ctypes.byref(self._layers[layer]),
            ctypes.byref(step),
            ctypes.c_void_p(self._tiles.keys[layer].data_ptr()),
            ctypes.c_void_p(self._tiles.values[layer].data_ptr()),
            ctypes.c_void_p(hidden.data_ptr()),
            most_threads(),
        )

    def route(self, layer: int, hidden: torch.Tensor) -> Routing:
        routing = self._routing(torch.empty(hidden.shape, dtype=self.dtype))
        self._library.dense_route(
            ctypes.byref(self._shape),
            ctypes.byref(self._layers[layer]),
            ctypes.c_void_p(hidden.data_ptr()),
            ctypes.c_int64(hidden.shape[0]),
            *(ctypes.c_void_p(t.data_ptr()) for t in (routing.hidden, routing.top_k_index, routing.top_k_weights)),
            most_threads(),
        )
        return routing

    def gate(self, layer: int, normed: torch.Tensor) -> Routing:
        routing = self._routing(normed.contiguous())
        self._library.dense_gate(
            ctypes.byref(self._shape),
            ctypes.byref(self._layers[layer]),
            ctypes.c_void_p(routing.hidden.data_ptr()),
            ctypes.c_int64(normed.shape[0]),
            *(ctypes.c_void_p(t.data_ptr()) for t in (routing.top_k_index, routing.top_k_weights)),
            most_threads(),
        )
        return routing

    def _routing(self, normed: torch.Tensor) -> Routing:
        shape = (normed.shape[0], self.config.num_experts_per_tok)
        return Routing(normed, torch.empty(shape, dtype=torch.int64), torch.empty(shape))
