"""A checkpoint whose gates send most tokens to a few experts of one shard."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.oracle import make_checkpoint

SHARDS = 4
EXPERTS = 8
HOT = (0, 4)
"""Both of shard 0."""


def make_skewed(path: Path) -> Path:
    """Write to `path` a small Mixtral whose every token likes the experts of HOT: the one always, the other often.

    All embeddings get the same large number in one place, which no layer takes away, and the gates' rows of the hot
    experts look at it.
    """
    make_checkpoint(path, "mixtral", num_local_experts=EXPERTS)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 4.0
        for layer in model.model.layers:
            gate = layer.mlp.gate.weight
            gate[:, 0] = 0.0
            for expert, strength in zip(HOT, (1.0, 0.15), strict=True):
                gate[expert, 0] = strength
    model.save_pretrained(path, max_shard_size="60KB")
    return path
