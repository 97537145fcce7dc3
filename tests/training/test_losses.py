"""The losses against transformers' and against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from training.evaluation import expert_use
from training.losses import load_balancing, router_z


def test_load_balancing_of_one_layer_is_transformers_divided_by_top_k() -> None:
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    theirs = load_balancing_loss_func((logits,), 8, 2)
    assert float(load_balancing(logits, 2)) == pytest.approx(float(theirs) / 2, rel=1e-5)


def test_load_balancing_is_one_when_even_and_grows_with_imbalance() -> None:
    even = 10 * torch.eye(4).repeat(5, 1)
    assert float(load_balancing(even, 1)) == pytest.approx(1.0, abs=1e-3)
    skewed = torch.zeros(20, 4)
    skewed[:, 0] = 10
    assert float(load_balancing(skewed, 1)) == pytest.approx(4.0, abs=1e-2)


def test_the_z_loss_is_the_mean_square_of_the_log_partition() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    want = (math.log(2) ** 2 + math.log(math.exp(1) + math.exp(2)) ** 2) / 2
    assert float(router_z(logits)) == pytest.approx(want, rel=1e-6)


def test_expert_use_says_even_and_uneven() -> None:
    even, one = expert_use(torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0]]))
    assert even.entropy == pytest.approx(1.0)
    assert even.imbalance == pytest.approx(1.0)
    assert one.entropy == pytest.approx(0.0, abs=1e-6)
    assert one.imbalance == pytest.approx(4.0)
