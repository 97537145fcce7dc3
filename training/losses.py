"""What is minimised: the next token's cross-entropy, and two losses that keep the gates useful."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Losses:
    """Scalars. `total` is what is minimised."""

    total: torch.Tensor
    cross_entropy: torch.Tensor
    balance: torch.Tensor
    z: torch.Tensor


def load_balancing(router_logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Switch Transformer's auxiliary loss (arXiv 2101.03961, equations 4 to 6) of one layer, for top-k.

    Args:
        router_logits: [T, E].
        top_k: experts per token.

    Returns:
        A scalar; 1 when all experts take equally many tokens. Unlike transformers' own, which pools all layers, an
        imbalance in one layer cannot hide behind the opposite one in another.

    """
    experts = router_logits.shape[-1]
    probabilities = F.softmax(router_logits.float(), dim=-1)  # [T, E]
    chosen = probabilities.topk(top_k, dim=-1).indices  # [T, k]
    share = F.one_hot(chosen, experts).float().sum(dim=(0, 1)) / chosen.numel()  # [E]
    return experts * (share * probabilities.mean(dim=0)).sum()


def router_z(router_logits: torch.Tensor) -> torch.Tensor:
    """ST-MoE's z loss (arXiv 2202.08906, equation 5) of one layer [T, E]: keeps the gate's logits small."""
    return torch.logsumexp(router_logits.float(), dim=-1).square().mean()


def losses(model: Any, tokens: torch.Tensor, *, top_k: int, balance_coefficient: float, z_coefficient: float) -> Losses:
    """All losses of one batch `tokens` [B, length + 1]."""
    out = model(input_ids=tokens[:, :-1], output_router_logits=True, use_cache=False)
    cross_entropy = F.cross_entropy(out.logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
    gates = [logits for logits in out.router_logits if logits is not None]
    balance = torch.stack([load_balancing(logits, top_k) for logits in gates]).mean()
    z = torch.stack([router_z(logits) for logits in gates]).mean()
    total = cross_entropy
    if gates[0].shape[-1] > 1:  # a dense model's only gate has nothing to choose
        total = total + balance_coefficient * balance + z_coefficient * z
    return Losses(total, cross_entropy, balance, z)
