"""Pruned experts: which channels go, and what is left of the sum."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from shared.pruning import CHANNEL_UNIT, kept_channels, prune


def expert(gate_up: torch.Tensor, down: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ down.T


@pytest.mark.parametrize(
    ("inner", "ratio", "kept"),
    [
        (1024, 0, 1024),
        (1024, 0.25, 768),
        (1024, 0.1, 928),
        (1408, 0.5, 704),
        (24, 0.25, 18),
        (24, 0.99, 1),
        (64, 0.9, 32),
    ],
)
def test_sizes_suit_the_kernels(inner: int, ratio: float, kept: int) -> None:
    assert kept_channels(inner, ratio) == kept


@pytest.mark.parametrize("inner", [1, 63, 64, 100, 1000])
def test_nothing_goes_without_a_ratio_unless_it_does_not_fit_the_unit(inner: int) -> None:
    assert kept_channels(inner, 0) == inner


def test_the_channels_that_matter_least_go() -> None:
    generator = torch.Generator().manual_seed(0)
    gate_up, down = torch.randn(128, 32, generator=generator), torch.randn(32, 64, generator=generator)
    idle = torch.randperm(64, generator=generator)[:CHANNEL_UNIT]
    gate_up[64 + idle[:16]] = 0
    down[:, idle[16:]] = 0
    small = prune(gate_up, down, 32)
    assert (small[0].shape, small[1].shape) == ((64, 32), (32, 32))
    x = torch.randn(5, 32, generator=generator)
    torch.testing.assert_close(expert(*small, x), expert(gate_up, down, x), rtol=1e-4, atol=1e-4)
