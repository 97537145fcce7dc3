"""The seam: routed experts are one call, and nothing else in the router knows where they are.

experts(layer, hidden [T, H], top_k_index [T, k], top_k_weights [T, k]) -> [T, H]
"""

from __future__ import annotations

from typing import Protocol

import torch

from shared.compute import Compute
from shared.experts import ExpertBank


class Experts(Protocol):
    """The weighted sum of each token's top-k experts, in `hidden`'s dtype."""

    async def __call__(
        self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Ask the experts.

        Args:
            layer: the layer's index in the model.
            hidden: [T, H], normed hidden states.
            top_k_index: [T, k] int64, experts of each token.
            top_k_weights: [T, k] float32.

        Returns:
            [T, H].

        Raises:
            MoeError: `shard_unavailable` and its kin, when an expert cannot be reached in time.

        """
        ...


class LocalExperts:
    """All experts in this process: for tests, training and comparison."""

    def __init__(self, bank: ExpertBank, compute: Compute) -> None:
        self._bank = bank
        self._compute = compute

    async def __call__(
        self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return await self._compute(self._run, layer, hidden, top_k_index, top_k_weights)

    def _run(
        self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        tokens, k = top_k_index.shape
        token_index = torch.arange(tokens, device=hidden.device).repeat_interleave(k)
        return self._bank.compute(layer, hidden, token_index, top_k_index.flatten(), top_k_weights.flatten())
