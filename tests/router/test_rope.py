"""Rotary embeddings against transformers' own, for every scaling variant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MixtralConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding, apply_rotary_pos_emb

from services.router.rope import RotaryEmbedding, rotate
from shared.checkpoint.config import parse_config

CPU = torch.device("cpu")
POSITIONS = torch.tensor([0, 1, 2, 31, 32, 33, 100, 127, 128, 500])
TOLERANCE = 1e-4
"""At position 500 an angle's last bit is worth 3e-5."""


def reference(max_position: int = 128, theta: float = 10000.0, **rope: Any) -> Any:
    """A transformers configuration with these rope parameters."""
    return MixtralConfig(
        vocab_size=32,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=max_position,
        rope_parameters={"rope_theta": theta, **rope},
    )


def ours(config: Any) -> RotaryEmbedding:
    """What we make of the same configuration."""
    return RotaryEmbedding(parse_config(config.to_dict(), {}, where="config.json"), CPU)


def check(config: Any) -> None:
    theirs, rope = MixtralRotaryEmbedding(config), ours(config)
    assert torch.allclose(rope._inv_freq, theirs.inv_freq, rtol=1e-6, atol=0)
    want_cos, want_sin = theirs(torch.zeros(1), POSITIONS[None])
    cos, sin = rope(POSITIONS, POSITIONS + 1)
    assert cos.shape == sin.shape == (POSITIONS.shape[0], 1, 16)
    assert torch.allclose(cos.squeeze(1), want_cos[0], atol=TOLERANCE)
    assert torch.allclose(sin.squeeze(1), want_sin[0], atol=TOLERANCE)


@pytest.mark.parametrize("theta", [100.0, 10000.0, 1e6])
def test_plain_rotation(theta: float) -> None:
    check(reference(theta=theta, rope_type="default"))


@pytest.mark.parametrize("factor", [1.0, 2.0, 7.5])
def test_linear_scaling(factor: float) -> None:
    check(reference(rope_type="linear", factor=factor))


@settings(max_examples=30, deadline=None)
@given(
    factor=st.floats(1, 32),
    low=st.floats(0.5, 2),
    spread=st.floats(0.5, 6),
    original=st.integers(8, 4096),
    theta=st.sampled_from([500.0, 10000.0, 500000.0]),
)
def test_llama3_scaling(factor: float, low: float, spread: float, original: int, theta: float) -> None:
    rope = {"low_freq_factor": low, "high_freq_factor": low + spread, "original_max_position_embeddings": original}
    check(reference(max_position=8192, theta=theta, rope_type="llama3", factor=factor, **rope))


YARN: list[dict[str, Any]] = [
    {},
    {"beta_fast": 16.0, "beta_slow": 2.0},
    {"attention_factor": 1.25},
    {"mscale": 1.0, "mscale_all_dim": 0.7},
    {"mscale": 0.707},
    {"truncate": False},
    {"truncate": False, "beta_fast": 64.0, "mscale": 1.2, "mscale_all_dim": 1.0},
]


@pytest.mark.parametrize("more", YARN, ids=str)
@pytest.mark.parametrize(("factor", "original"), [(4.0, 32), (1.0, 128), (40.0, 4096)])
def test_yarn_scaling(more: dict[str, Any], factor: float, original: int) -> None:
    rope = {"factor": factor, "original_max_position_embeddings": original, **more}
    check(reference(max_position=int(original * factor), rope_type="yarn", **rope))


@settings(max_examples=30, deadline=None)
@given(factor=st.floats(1, 64), original=st.integers(4, 8192), theta=st.sampled_from([100.0, 10000.0, 1e6]))
def test_yarn_scaling_of_any_size(factor: float, original: int, theta: float) -> None:
    rope = {"factor": factor, "original_max_position_embeddings": original}
    check(reference(max_position=max(1, int(original * factor)), theta=theta, rope_type="yarn", **rope))


@pytest.mark.parametrize("factor", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("length", [1, 20, 48, 49, 60, 96, 500])
def test_dynamic_scaling_depends_on_the_sequences_length(factor: float, length: int) -> None:
    config = reference(max_position=48, rope_type="dynamic", factor=factor)
    inv_freq, scale = ROPE_INIT_FUNCTIONS["dynamic"](config, CPU, seq_len=length)
    assert scale == 1.0
    positions = torch.arange(length)
    angles = positions[:, None].float() * inv_freq  # [T, D/2]
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin = ours(config)(positions, torch.full((length,), length))
    assert torch.allclose(cos.squeeze(1), angles.cos(), atol=TOLERANCE)
    assert torch.allclose(sin.squeeze(1), angles.sin(), atol=TOLERANCE)


def test_rows_of_different_lengths_scale_each_by_its_own() -> None:
    rope = ours(reference(max_position=48, rope_type="dynamic", factor=2.0))
    positions, lengths = torch.tensor([5, 5, 40, 90]), torch.tensor([10, 200, 60, 91])
    together = rope(positions, lengths)
    for row in range(4):
        alone = rope(positions[row : row + 1], lengths[row : row + 1])
        assert torch.equal(together[0][row], alone[0][0])
        assert torch.equal(together[1][row], alone[1][0])
    assert not torch.equal(together[0][0], together[0][1])


@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(1, 9), heads=st.integers(1, 4), half=st.integers(1, 8), seed=st.integers(0, 99))
def test_rotating_is_transformers_rotation(tokens: int, heads: int, half: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, heads, 2 * half, generator=generator)
    angles = torch.randn(tokens, half, generator=generator).repeat(1, 2)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # [T, 1, D]
    want, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos[None, :, 0], sin[None, :, 0])
    assert torch.allclose(rotate(x, cos, sin), want[0].transpose(0, 1), atol=1e-6)
