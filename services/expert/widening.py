"""Whether a worker keeps its bfloat16 experts as float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from shared.checkpoint import ModelConfig

SHARE_OF_MEMORY = 0.5


@dataclass(frozen=True)
class Widening:
    """A decision and its reason, for the log."""

    widen: bool
    reason: str


def widened_bytes(config: ModelConfig, *, workers: int, shards: int) -> int:
    """Bytes of all experts as float32, as often as `workers` hold each of `shards` shards."""
    replicas = -(-workers // shards)
    per_expert = 3 * config.moe_intermediate_size * config.hidden_size * torch.float32.itemsize
    return per_expert * config.num_experts * len(config.moe_layers) * replicas


def choose_widening(
    setting: Literal["auto", "on", "off"],
    *,
    dtype: torch.dtype,
    device: torch.device,
    native: bool,
    needed: int,
    available: int,
) -> Widening:
    """Decide, for the setting WIDEN_WEIGHTS.

    All experts count and not this worker's alone: the workers of one machine start together, and each sees the memory
    that the others have not taken yet.

    Args:
        setting: as the user chose.
        dtype: what the experts are computed in.
        device: where.
        native: this CPU multiplies bfloat16 itself.
        needed: bytes of all experts when widened.
        available: bytes that may still be taken.

    """
    if dtype is not torch.bfloat16 or device.type != "cpu":
        return Widening(False, f"nothing to widen: {str(dtype).removeprefix('torch.')} on {device.type}")
    if setting != "auto":
        return Widening(setting == "on", f"WIDEN_WEIGHTS={setting}")
    if native:
        return Widening(False, "this CPU multiplies bfloat16 itself")
    sizes = f"{needed / 1e9:.2f} GB of all experts in float32, {available / 1e9:.2f} GB of memory available"
    if needed > SHARE_OF_MEMORY * available:
        return Widening(False, f"more than half of the memory: {sizes}")
    return Widening(True, f"this CPU has no bfloat16 instructions, and memory is ample: {sizes}")
