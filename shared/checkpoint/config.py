"""`config.json` of the supported families, as transformers 4 and 5 write it, made into one typed ModelConfig."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

from shared.errors import CheckpointError

Family = Literal["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"]
FAMILIES: tuple[Family, ...] = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_THETA = {"mixtral": 1e6, "olmoe": 1e4, "qwen2_moe": 1e4, "qwen3_moe": 1e4}
DEFAULT_EPS = {"mixtral": 1e-5, "olmoe": 1e-5, "qwen2_moe": 1e-6, "qwen3_moe": 1e-6}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) and its scaling variant."""

    type: str
    theta: float
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """Everything about a model's shape and switches that its forward pass depends on."""

    family: Family
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    """Of dense MLP layers."""
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    """0: no shared expert."""
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    hidden_act: str
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    qk_norm: Literal["none", "head", "whole"]
    clip_qkv: float | None
    sliding_windows: tuple[int | None, ...]
    """Per layer; None attends to everything before."""
    moe_layers: tuple[int, ...]
    rope: RopeConfig
    dtype: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def context_length(self) -> int:
        """The longest sequence: dynamic scaling is for those beyond the positions of training."""
        stretch = self.rope.factor if self.rope.type == "dynamic" else 1.0
        return int(self.max_position_embeddings * stretch)


class _Reader:
    """Typed access to config.json; every complaint names the file and the key."""

    def __init__(self, raw: dict[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where

    def fail(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {text}")

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.fail(f"{key} must be an integer of at least {least}, not {value!r}")
        return value

    def number(self, key: str, default: float | None) -> float | None:
        value = self.raw.get(key)
        value = default if value is None else value
        if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
            raise self.fail(f"{key} must be a number, not {value!r}")
        if value is not None and not 0 <= value < sys.float_info.max:  # NaN is neither
            raise self.fail(f"{key} must be finite and not negative, not {str(value)[:40]}")
        return None if value is None else float(value)

    def flag(self, key: str, *, default: bool) -> bool:
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.fail(f"{key} must be true or false, not {value!r}")
        return value


def _rope(r: _Reader, family: Family, max_position: int) -> RopeConfig:
    """Transformers 5 writes `rope_parameters`, transformers 4 `rope_theta` and `rope_scaling`."""
    merged: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        part = r.raw.get(key)
        if part is not None and not isinstance(part, dict):
            raise r.fail(f"{key} must be an object, not {part!r}")
        merged |= part or {}
    kind = merged.get("rope_type") or merged.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise r.fail(f"rope type {kind!r} is not supported (supported: {', '.join(ROPE_TYPES)})")
    p = _Reader(merged, f"{r.where}: rope")
    for reader in (r, p):
        if (reader.number("partial_rotary_factor", 1.0) or 1.0) != 1.0:
            raise r.fail("partial_rotary_factor other than 1 is not supported")
    theta = p.number("rope_theta", r.number("rope_theta", DEFAULT_THETA[family]))
    original = p.integer("original_max_position_embeddings", max_position)
    factor = p.number("factor", None)
    if factor is None:
        if kind not in ("default", "yarn"):
            raise r.fail(f"rope type {kind!r} needs a factor")
        factor = max_position / original
    if not factor:
        raise r.fail("rope's factor must be above 0")
    return RopeConfig(
        type=kind,
        theta=theta or DEFAULT_THETA[family],
        factor=factor,
        original_max_position_embeddings=original,
        low_freq_factor=p.number("low_freq_factor", 1.0) or 1.0,
        high_freq_factor=p.number("high_freq_factor", 4.0) or 4.0,
        attention_factor=p.number("attention_factor", None),
        beta_fast=p.number("beta_fast", None) or 32.0,
        beta_slow=p.number("beta_slow", None) or 1.0,
        mscale=p.number("mscale", None),
        mscale_all_dim=p.number("mscale_all_dim", None),
        truncate=p.flag("truncate", default=True),
    )


def _sliding_windows(r: _Reader, family: Family, layers: int) -> tuple[int | None, ...]:
    if family == "olmoe":
        return (None,) * layers
    window = r.number("sliding_window", None)
    size = int(window) if window else None
    if family == "mixtral":
        return (size,) * layers
    if not r.flag("use_sliding_window", default=False):
        return (None,) * layers
    if size is None:
        size = r.integer("sliding_window", 4096)
    if family == "qwen3_moe":
        return (size,) * layers
    kinds = r.raw.get("layer_types")
    if kinds is None:
        most = r.integer("max_window_layers", 28, least=0)
        kinds = ["sliding_attention" if i % 2 == 0 and i < most else "full_attention" for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise r.fail(f"layer_types must name a type for each of the {layers} layers")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise r.fail(f"layer type {kind!r} is not supported")
    return tuple(size if kind == "sliding_attention" else None for kind in kinds)


def _token_ids(value: Any, where: str) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise CheckpointError(f"{where}: eos_token_id must be an integer or a list of them, not {value!r}")
    return tuple(ids)


def parse_config(raw: dict[str, Any], generation: dict[str, Any], *, where: str) -> ModelConfig:
    """A ModelConfig from the contents of config.json and generation_config.json.

    Raises:
        CheckpointError: an unsupported family or switch, or a value out of range, by name.

    """
    r = _Reader(raw, where)
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise r.fail(f"model_type {family!r} is not supported (supported: {', '.join(FAMILIES)})")
    for switch in ("quantization_config", "compression_config"):
        if raw.get(switch) is not None:
            raise r.fail(f"{switch} is not supported; serve the unquantized checkpoint")
    act = raw.get("hidden_act") or "silu"
    if act not in ACTIVATIONS:
        raise r.fail(f"hidden_act {act!r} is not supported (supported: {', '.join(ACTIVATIONS)})")
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise r.fail(f"dtype {dtype!r} is not supported (supported: {', '.join(DTYPES)})")

    layers = r.integer("num_hidden_layers")
    hidden = r.integer("hidden_size")
    heads = r.integer("num_attention_heads")
    kv_heads = r.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise r.fail(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    if raw.get("head_dim") is None and hidden % heads:
        raise r.fail(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    head_dim = r.integer("head_dim", hidden // heads)
    qwen = family in ("qwen2_moe", "qwen3_moe")
    experts = r.integer("num_experts" if raw.get("num_experts") is not None else "num_local_experts")
    top_k = r.integer("num_experts_per_tok", 2)
    if top_k > experts:
        raise r.fail(f"num_experts_per_tok {top_k} is more than the {experts} experts")
    only_dense = raw.get("mlp_only_layers") or []
    if not isinstance(only_dense, list):
        raise r.fail(f"mlp_only_layers must be a list, not {only_dense!r}")
    step = r.integer("decoder_sparse_step", 1) if qwen else 1
    moe_layers = tuple(i for i in range(layers) if not (qwen and i in only_dense) and (i + 1) % step == 0)
    if not moe_layers:
        raise r.fail("no layer has experts; this is a dense model")
    intermediate = r.integer("intermediate_size", None if not qwen else hidden * 4)
    max_position = r.integer("max_position_embeddings")
    attention_bias = r.flag("attention_bias", default=False)
    eos = generation.get("eos_token_id")
    eps = r.number("rms_norm_eps", DEFAULT_EPS[family])
    clip = r.number("clip_qkv", None) if family == "olmoe" else None
    return ModelConfig(
        family=family,
        vocab_size=r.integer("vocab_size"),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        moe_intermediate_size=r.integer("moe_intermediate_size") if qwen else intermediate,
        shared_expert_intermediate_size=r.integer("shared_expert_intermediate_size") if family == "qwen2_moe" else 0,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True if family == "mixtral" else r.flag("norm_topk_prob", default=False),
        hidden_act=act,
        rms_norm_eps=DEFAULT_EPS[family] if eps is None else eps,
        max_position_embeddings=max_position,
        tie_word_embeddings=r.flag("tie_word_embeddings", default=False),
        qkv_bias=r.flag("qkv_bias", default=True) if family == "qwen2_moe" else attention_bias and family != "mixtral",
        output_bias=attention_bias and family in ("olmoe", "qwen3_moe"),
        qk_norm={"olmoe": "whole", "qwen3_moe": "head"}.get(family, "none"),  # type: ignore[arg-type]
        clip_qkv=clip,
        sliding_windows=_sliding_windows(r, family, layers),
        moe_layers=moe_layers,
        rope=_rope(r, family, max_position),
        dtype=dtype,
        bos_token_id=raw.get("bos_token_id") if isinstance(raw.get("bos_token_id"), int) else None,
        eos_token_ids=_token_ids(raw.get("eos_token_id") if eos is None else eos, where),
    )
