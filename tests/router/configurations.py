"""Model configurations for tests that need no checkpoint."""

from __future__ import annotations

from typing import Any

from shared.checkpoint import ModelConfig
from shared.checkpoint.config import parse_config

_TINY: dict[str, Any] = {
    "model_type": "mixtral",
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
}


def configuration(**changes: Any) -> ModelConfig:
    """A tiny Mixtral's configuration with these changes."""
    return parse_config({**_TINY, **changes}, {}, where="config.json")
