"""How evenly experts and shards are used. Pure functions over counts of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def entropy(counts: Sequence[int]) -> float | None:
    """Routing entropy as a share of its maximum: 1 is even, 0 is one expert only."""
    total = sum(counts)
    if not total or len(counts) < 2:
        return None
    shares = [c / total for c in counts if c]
    return -sum(p * math.log(p) for p in shares) / math.log(len(counts))


def imbalance(counts: Sequence[int]) -> float | None:
    """Most loaded over mean; 1 is even."""
    total = sum(counts)
    return max(counts) * len(counts) / total if total else None


def expert_utilisation(layers: Sequence[int], per_router: Sequence[Sequence[Sequence[int]]]) -> list[dict[str, Any]]:
    """Per MoE layer: tokens of each expert over all routers, their entropy and imbalance."""
    result = []
    for row, layer in enumerate(layers):
        rows = [router[row] for router in per_router if row < len(router)]
        counts = [sum(column) for column in zip(*rows, strict=False)] if rows else []
        even, skew = entropy(counts), imbalance(counts)
        result.append(
            {
                "layer": layer,
                "tokens": counts,
                "entropy": None if even is None else round(even, 4),
                "imbalance": None if skew is None else round(skew, 3),
            }
        )
    return result
