"""The seam: routed experts are one question, and nothing else in the router knows where they are."""

from __future__ import annotations

from typing import Protocol

import torch

from shared.compute import Compute
from shared.experts import ExpertBank


class Question(Protocol):
    """What one layer's experts are asked, and then what they said."""

    degraded: torch.Tensor | None
    """[T] bool, after `ask`: rows that lack some of their experts; None if none does."""

    async def ask(self) -> None:
        """Ask, and wait for every answer.

        Raises:
            MoeError: `shard_unavailable` and its kin, when an expert cannot be reached in time.

        """
        ...

    def result(self) -> torch.Tensor:
        """[T, H] float32: the weighted sum of each token's experts. Only after `ask`.

        Raises:
            MoeError: `shard_unavailable`, if an answer is no answer.

        """
        ...


class Experts(Protocol):
    """Whoever computes the routed experts."""

    def question(
        self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> Question:
        """Prepare what the experts are asked; computes, so it belongs where the model computes.

        Args:
            layer: the layer's index in the model.
            hidden: [T, H], normed hidden states.
            top_k_index: [T, k] int64, experts of each token.
            top_k_weights: [T, k] float32.

        """
        ...


class LocalExperts:
    """All experts in this process: for tests, training and comparison."""

    def __init__(self, bank: ExpertBank, compute: Compute) -> None:
        self._bank = bank
        self._compute = compute

    def question(
        self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> LocalQuestion:
        return LocalQuestion(self._bank, self._compute, layer, hidden, top_k_index, top_k_weights)


class LocalQuestion:
    def __init__(
        self,
        bank: ExpertBank,
        compute: Compute,
        layer: int,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> None:
        self._bank = bank
        self._compute = compute
        tokens, k = top_k_index.shape
        token_index = torch.arange(tokens, device=hidden.device).repeat_interleave(k)
        self._pairs = (layer, hidden, token_index, top_k_index.flatten(), top_k_weights.flatten())
        self.degraded: torch.Tensor | None = None
        self._out: torch.Tensor | None = None

    async def ask(self) -> None:
        self._out = await self._compute(self._bank.compute, *self._pairs)

    def result(self) -> torch.Tensor:
        assert self._out is not None  # noqa: S101 - `ask` comes first
        return self._out.float()
