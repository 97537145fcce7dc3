"""config.json of the supported families: what is read, and what is refused by name."""

from __future__ import annotations

import re
from typing import Any

import pytest

from shared.checkpoint.config import FAMILIES, ModelConfig, parse_config
from shared.errors import CheckpointError

WHERE = "models/x/config.json"
BASE: dict[str, Any] = {
    "model_type": "olmoe",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
}
OWN: dict[str, dict[str, Any]] = {
    "mixtral": {"num_experts": None, "num_local_experts": 6},
    "olmoe": {},
    "qwen2_moe": {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {"moe_intermediate_size": 16, "head_dim": 16},
}


def parse(family: str = "olmoe", generation: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    return parse_config({**BASE, "model_type": family, **OWN[family], **changes}, generation or {}, where=WHERE)


def refusal(family: str = "olmoe", generation: dict[str, Any] | None = None, **changes: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        parse(family, generation, **changes)
    text = str(caught.value)
    assert text.startswith(f"{WHERE}: ")
    assert "\n" not in text
    return text


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read(family: str) -> None:
    config = parse(family)
    assert config.family == family
    assert config.num_experts == 6
    assert config.moe_layers == (0, 1, 2, 3)
    assert config.head_dim == (16 if family == "qwen3_moe" else 8)
    assert config.num_key_value_heads == 4
    assert config.moe_intermediate_size == (16 if family.startswith("qwen") else 24)
    assert config.shared_expert_intermediate_size == (40 if family == "qwen2_moe" else 0)
    assert config.norm_topk_prob is (family == "mixtral")
    assert config.qkv_bias is (family == "qwen2_moe")
    assert config.qk_norm == {"olmoe": "whole", "qwen3_moe": "head"}.get(family, "none")


def test_which_layers_have_experts() -> None:
    assert parse("qwen3_moe", mlp_only_layers=[1]).moe_layers == (0, 2, 3)
    assert parse("qwen3_moe", decoder_sparse_step=2).moe_layers == (1, 3)
    assert parse("olmoe", decoder_sparse_step=2, mlp_only_layers=[1]).moe_layers == (0, 1, 2, 3), "Qwen's switches only"


def test_rope_of_transformers_4_and_5_is_the_same() -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32}
    new = parse(rope_parameters={"rope_type": "yarn", "rope_theta": 5e5, **scaling})
    old = parse(rope_theta=5e5, rope_scaling={"type": "yarn", **scaling})
    assert new.rope == old.rope
    assert (new.rope.type, new.rope.theta, new.rope.factor) == ("yarn", 5e5, 4.0)
    assert parse(rope_scaling=None).rope.type == "default"


def test_dtype_of_transformers_4_and_5_is_the_same() -> None:
    assert parse(dtype="bfloat16").dtype == parse(torch_dtype="bfloat16").dtype == "bfloat16"
    assert parse().dtype == "float32"


def test_end_of_sequence_tokens_come_from_the_generation_config_first() -> None:
    assert parse(eos_token_id=3).eos_token_ids == (3,)
    assert parse(eos_token_id=[3, 4]).eos_token_ids == (3, 4)
    assert parse(generation={"eos_token_id": [7, 8]}, eos_token_id=3).eos_token_ids == (7, 8)
    assert parse().eos_token_ids == ()


def test_sliding_windows_per_family() -> None:
    assert parse("mixtral", sliding_window=9).sliding_windows == (9,) * 4
    assert parse("mixtral", sliding_window=None).sliding_windows == (None,) * 4
    assert parse("olmoe", sliding_window=9).sliding_windows == (None,) * 4
    assert parse("qwen3_moe", sliding_window=9).sliding_windows == (None,) * 4
    assert parse("qwen3_moe", sliding_window=9, use_sliding_window=True).sliding_windows == (9,) * 4
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    layered = parse("qwen2_moe", sliding_window=9, use_sliding_window=True, layer_types=kinds)
    assert layered.sliding_windows == (None, 9, None, 9)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("model_type", None),
        ("quantization_config", {"quant_method": "gptq"}),
        ("compression_config", {}),
        ("hidden_act", "relu6"),
        ("dtype", "float64"),
        ("torch_dtype", "int8"),
        ("num_hidden_layers", 0),
        ("hidden_size", "32"),
        ("hidden_size", 32.0),
        ("hidden_size", True),
        ("vocab_size", None),
        ("vocab_size", -1),
        ("max_position_embeddings", None),
        ("num_attention_heads", 0),
        ("num_experts_per_tok", 0),
        ("norm_topk_prob", "yes"),
        ("tie_word_embeddings", 1),
        ("rms_norm_eps", "1e-5"),
        ("clip_qkv", "8"),
        ("rope_parameters", [1]),
        ("rope_scaling", "linear"),
        ("partial_rotary_factor", 0.5),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [1, 2.5]),
    ],
)
def test_a_switch_that_is_not_supported_is_refused_by_name(key: str, value: Any) -> None:
    assert re.search(rf"\b{key.removeprefix('torch_')}\b", refusal(**{key: value}))


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("olmoe", "rms_norm_eps", float("nan")),
        ("mixtral", "sliding_window", float("inf")),
        ("mixtral", "sliding_window", float("nan")),
        ("mixtral", "sliding_window", -4),
        ("olmoe", "rope_theta", -1.0),
        ("olmoe", "rope_theta", 10**400),
        ("olmoe", "rope_scaling", {"rope_type": "linear", "factor": 0}),
    ],
)
def test_a_number_that_makes_no_sense_is_refused_by_name(family: str, key: str, value: Any) -> None:
    assert key in refusal(family, **{key: value}) or "factor" in refusal(family, **{key: value})


def test_wrong_relations_are_refused_by_name() -> None:
    assert "num_experts_per_tok 7 is more than the 6 experts" in refusal(num_experts_per_tok=7)
    assert "num_key_value_heads 3" in refusal(num_key_value_heads=3)
    assert "num_attention_heads 5" in refusal(num_attention_heads=5)
    assert "dense model" in refusal("qwen3_moe", mlp_only_layers=[0, 1, 2, 3])
    assert "mlp_only_layers" in refusal("qwen3_moe", mlp_only_layers=1)
    assert "num_local_experts" in refusal("mixtral", num_local_experts=None)


def test_rope_that_is_not_supported_is_refused_by_name() -> None:
    assert "'longrope'" in refusal(rope_parameters={"rope_type": "longrope", "factor": 2.0})
    assert "'linear' needs a factor" in refusal(rope_parameters={"rope_type": "linear"})
    assert "factor must be a number" in refusal(rope_parameters={"rope_type": "linear", "factor": "2"})
    assert "partial_rotary_factor" in refusal(rope_parameters={"partial_rotary_factor": 0.25})


def test_layer_types_that_do_not_fit_are_refused_by_name() -> None:
    sliding: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 9}
    assert "layer_types" in refusal("qwen2_moe", **sliding, layer_types=["full_attention"])
    assert "'chunked_attention'" in refusal("qwen2_moe", **sliding, layer_types=["chunked_attention"] * 4)


def test_the_generation_configs_tokens_are_checked_too() -> None:
    assert "eos_token_id" in refusal(generation={"eos_token_id": {"a": 1}})
