"""Random checkpoints in the shapes that are measured: `python -m bench.checkpoints olmoe FOLDER`.

olmoe: OLMoE-1B-7B's shape (arXiv 2409.02060) with 4 of its 16 layers, 3.6 GB; mixtral: 0.7 GB; qwen3: Qwen3-MoE's heads
of 128 (arXiv 2505.09388) and 64 small experts, 0.8 GB; tiny: overhead only; dispatch: one layer for bench.dispatch;
layer: one MoE layer, 0.2 GB, in float32. The others are bfloat16. Weights are random, so the texts are noise; speed
does not depend on what the numbers are.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

COMMON: dict[str, Any] = {"max_position_embeddings": 4096, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 2}


def _olmoe(**shape: Any) -> Any:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    return OlmoeForCausalLM(OlmoeConfig(**{**COMMON, **shape}))


def _mixtral(**shape: Any) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**{**COMMON, "sliding_window": None, **shape}))


def _qwen3(**shape: Any) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**COMMON, "norm_topk_prob": True, **shape}))


MIXTRAL: dict[str, int] = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "num_hidden_layers": 8,
    "vocab_size": 32000,
}
SHAPES: dict[str, tuple[Callable[..., Any], dict[str, int]]] = {
    "olmoe": (
        _olmoe,
        {
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_hidden_layers": 4,
            "vocab_size": 50304,
        },
    ),
    "mixtral": (_mixtral, MIXTRAL),
    "qwen3": (
        _qwen3,
        {
            "hidden_size": 1024,
            "moe_intermediate_size": 256,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_hidden_layers": 6,
            "vocab_size": 32000,
        },
    ),
    "dispatch": (
        _mixtral,
        {
            "hidden_size": 2048,
            "intermediate_size": 16,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "num_hidden_layers": 1,
            "vocab_size": 64,
        },
    ),
    "tiny": (
        _olmoe,
        {
            "hidden_size": 256,
            "intermediate_size": 256,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "num_hidden_layers": 4,
            "vocab_size": 4096,
        },
    ),
    "layer": (_mixtral, {**MIXTRAL, "num_hidden_layers": 1, "vocab_size": 4096}),
}
DTYPES = {"layer": torch.float32}
"""Of those that are not bfloat16."""


def write(name: str, folder: Path, **sizes: int) -> Path:
    """Write the checkpoint `name` of SHAPES to `folder`, unless one is there.

    Args:
        name: of SHAPES.
        folder: where to.
        sizes: fields of the config that differ from those of SHAPES, such as num_experts=128.

    """
    if (folder / "config.json").exists():
        return folder
    make, shape = SHAPES[name]
    shape = {**shape, **sizes}
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPES.get(name, torch.bfloat16))
    try:
        model = make(**shape)
    finally:
        torch.set_default_dtype(torch.float32)
    size = shape["vocab_size"]
    vocabulary = {f"w{i}": i for i in range(size - 1)} | {"<unk>": size - 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106 - not a password
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    model.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    print(write(arguments.name, arguments.folder))


if __name__ == "__main__":
    main()
