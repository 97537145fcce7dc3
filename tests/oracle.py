"""The oracle: transformers, on tiny random checkpoints of every supported family and switch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB = 160
_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "eos_token_id": 1,
    "bos_token_id": None,
    "pad_token_id": 0,
}
_QWEN = {"moe_intermediate_size": 24, "intermediate_size": 48, "num_experts": 6, "head_dim": 8}


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"intermediate_size": 24, "num_local_experts": 6}),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM, {"intermediate_size": 24, "num_experts": 6, "num_key_value_heads": 4}),
    "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM, {**_QWEN, "shared_expert_intermediate_size": 40}),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, _QWEN),
}

YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

# name -> (family, what differs from the family's defaults)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "mixtral-sliding-window": ("mixtral", {"sliding_window": 9}),
    "mixtral-head-dim": ("mixtral", {"head_dim": 16}),
    "mixtral-tied": ("mixtral", {"tie_word_embeddings": True}),
    "mixtral-gelu": ("mixtral", {"hidden_act": "gelu"}),
    "mixtral-gelu-tanh": ("mixtral", {"hidden_act": "gelu_pytorch_tanh"}),
    "olmoe": ("olmoe", {}),
    "olmoe-gqa": ("olmoe", {"num_key_value_heads": 2}),
    "olmoe-clip": ("olmoe", {"clip_qkv": 0.4}),
    "olmoe-norm-topk": ("olmoe", {"norm_topk_prob": True}),
    "olmoe-attention-bias": ("olmoe", {"attention_bias": True}),
    "qwen2": ("qwen2_moe", {}),
    "qwen2-no-bias": ("qwen2_moe", {"qkv_bias": False}),
    "qwen2-sparse-step": ("qwen2_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 4}),
    "qwen2-mlp-only": ("qwen2_moe", {"mlp_only_layers": [0]}),
    "qwen2-sliding": ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}),
    "qwen3": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3-attention-bias": ("qwen3_moe", {"attention_bias": True}),
    "qwen3-sliding": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 11}),
    "qwen3-mlp-only-tied": ("qwen3_moe", {"mlp_only_layers": [1], "tie_word_embeddings": True}),
    "rope-linear": ("mixtral", _rope("linear", factor=4.0)),
    "rope-dynamic": ("mixtral", {"head_dim": 8, **_rope("dynamic", factor=4.0), "max_position_embeddings": 48}),
    "rope-llama3": ("mixtral", _rope("llama3", **LLAMA3)),
    "rope-yarn": ("qwen3_moe", _rope("yarn", **YARN)),
    "rope-yarn-mscale": (
        "mixtral",
        {"head_dim": 8, **_rope("yarn", mscale=1.0, mscale_all_dim=0.7, truncate=False, **YARN)},
    ),
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens: small, lossless, and every id has a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", "<eos>", *alphabet[: VOCAB - 2]]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def make_checkpoint(path: Path, variant: str, *, dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    """Write the random checkpoint of `variant` to `path`, in several safetensors files with an index."""
    family, changes = VARIANTS[variant]
    config_class, model_class, own = FAMILIES[family]
    torch.manual_seed(7)
    config = config_class(**{**_BASE, **own, **changes, **more})
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The library's own initialisation makes logits nearly flat; spread them so that differences show.
            if parameter.dim() > 1:
                parameter.normal_(std=0.08 if "embed" not in name else 1.0)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
            else:
                parameter.uniform_(0.7, 1.3)
    model.to(dtype).save_pretrained(path, max_shard_size="60KB")
    byte_tokenizer().save_pretrained(path)
    return path


def as_transformers_4(path: Path) -> None:
    """Rewrite config.json's rope and dtype keys as transformers 4 wrote them."""
    file = path / "config.json"
    raw = json.loads(file.read_text())
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    raw["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    raw["torch_dtype"] = raw.pop("dtype", "float32")
    file.write_text(json.dumps(raw))


@dataclass(frozen=True)
class Expected:
    prompt_logits: torch.Tensor
    """[T, V]"""
    logits: torch.Tensor
    """[new, V]"""
    tokens: list[int]


class Oracle:
    """transformers' own model of a checkpoint."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        self._path = path
        self._dtype = dtype
        self.model = self._load()

    def _load(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self._path, dtype=self._dtype, attn_implementation="eager").eval()

    @torch.no_grad()
    def greedy(self, prompt: list[int], new_tokens: int) -> Expected:
        """Greedy continuation with a KV cache, one token at a time."""
        model = self._load() if self.model.config.rope_parameters["rope_type"] == "dynamic" else self.model
        out = model(torch.tensor([prompt]), use_cache=True)
        rows, tokens = [out.logits[0, -1]], []
        for step in range(new_tokens):
            token = int(rows[-1].argmax())
            tokens.append(token)
            if step + 1 < new_tokens:
                past = out.past_key_values
                position = torch.tensor([[len(prompt) + step]])
                out_step = model(torch.tensor([[token]]), past_key_values=past, position_ids=position, use_cache=True)
                rows.append(out_step.logits[0, -1])
        return Expected(out.logits[0].float(), torch.stack(rows).float(), tokens)
