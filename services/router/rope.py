"""Rotary position embedding (RoFormer, arXiv 2104.09864) and the scaling variants that checkpoints name."""

from __future__ import annotations

import math

import torch

from shared.checkpoint import ModelConfig
from shared.checkpoint.config import RopeConfig


def _llama3(inv_freq: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Llama 3.1's scaling: long wavelengths are divided by `factor`, short ones kept, those between interpolated."""
    low_wavelength = rope.original_max_position_embeddings / rope.low_freq_factor
    high_wavelength = rope.original_max_position_embeddings / rope.high_freq_factor
    wavelength = 2 * math.pi / inv_freq
    smooth = (rope.original_max_position_embeddings / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    scaled = torch.where(wavelength > low_wavelength, inv_freq / rope.factor, inv_freq)
    between = (wavelength <= low_wavelength) & (wavelength >= high_wavelength)
    return torch.where(between, (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq, scaled)


def _yarn(dim: int, rope: RopeConfig) -> tuple[torch.Tensor, float]:
    """YaRN (arXiv 2309.00071): interpolate the slow dimensions, keep the fast ones, scale the attention."""

    def mscale(scale: float, by: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * by * math.log(scale) + 1.0

    def correction_dim(rotations: float) -> float:
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(rope.theta))

    attention = rope.attention_factor
    if attention is None and rope.mscale and rope.mscale_all_dim:
        attention = mscale(rope.factor, rope.mscale) / mscale(rope.factor, rope.mscale_all_dim)
    elif attention is None:
        attention = mscale(rope.factor)
    low, high = correction_dim(rope.beta_fast), correction_dim(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    frequencies = 1.0 / rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return frequencies / rope.factor * ramp + frequencies * (1 - ramp), attention


class RotaryEmbedding:
    """cos and sin for rows of a batch."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._rope = rope = config.rope
        self._dim = dim = config.head_dim
        self._max_position = config.max_position_embeddings
        self._scale = 1.0
        inv_freq = 1.0 / rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        if rope.type == "linear":
            inv_freq = inv_freq / rope.factor
        elif rope.type == "llama3":
            inv_freq = _llama3(inv_freq, rope)
        elif rope.type == "yarn":
            inv_freq, self._scale = _yarn(dim, rope)
        self._inv_freq = inv_freq.to(device)
        self._exponents = (torch.arange(0, dim, 2, dtype=torch.float32) / dim).to(device)

    def __call__(self, positions: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotation of each row.

        Args:
            positions: [T] int64.
            lengths: [T] int64, the sequence's length when the row was first computed: dynamic NTK scaling depends on
                it (prompt rows: the prompt's length).

        Returns:
            cos and sin, [T, 1, head_dim] float32.

        """
        inv_freq = self._inv_freq
        if self._rope.type == "dynamic":
            length = lengths.clamp(min=self._max_position).float()  # [T]
            factor, dim = self._rope.factor, self._dim
            theta = self._rope.theta * (factor * length / self._max_position - (factor - 1)) ** (dim / (dim - 2))
            inv_freq = 1.0 / theta[:, None] ** self._exponents  # [T, D/2]
        angles = positions[:, None].float() * inv_freq  # [T, D/2]
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)  # [T, 1, D]
        return angles.cos() * self._scale, angles.sin() * self._scale


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `x` [T, heads, D] by cos, sin [T, 1, D]."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin
