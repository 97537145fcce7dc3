"""Structured sparsity: an expert without its least important channels is a smaller expert."""

from __future__ import annotations

import torch

CHANNEL_UNIT = 32
"""Kernels like their sizes in such multiples; smaller experts are cut exactly."""


def kept_channels(inner: int, ratio: float) -> int:
    """How many of `inner` channels stay when `ratio` of them go."""
    kept = inner - int(inner * ratio)
    if kept == inner:
        return inner
    return max(1, kept) if inner < 2 * CHANNEL_UNIT else max(1, round(kept / CHANNEL_UNIT)) * CHANNEL_UNIT


def prune(gate_up: torch.Tensor, down: torch.Tensor, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The expert with its `kept` most important channels, in their order: [2K, H] and [H, K].

    A channel's importance is the product of the norms of its three vectors: what it adds to the output grows with each
    of them. Source: LLM-Pruner (arXiv 2305.11627), coupled structures with weight magnitudes and "production".

    Args:
        gate_up: [2I, H], gate's rows, then up's.
        down: [H, I].
        kept: K, at most I.

    """
    inner = down.shape[1]
    gate, up = gate_up[:inner], gate_up[inner:]
    importance = gate.float().norm(dim=1) * up.float().norm(dim=1) * down.float().norm(dim=0)  # [I]
    stay = importance.topk(kept).indices.sort().values  # [K]
    return torch.cat((gate[stay], up[stay])), down[:, stay].contiguous()
