"""Which of a hot expert's copies computes a token: a function of the token's hidden state and of nothing else.

So neither the other tokens of a batch nor the router that computes it have a say in a token's result, and what is
computed again is computed in the same place.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from services.monitor.messages import PARTS, ExpertPlan

HASHED_WORDS = 8
"""Of 8 bytes: 16 to 32 numbers of a hidden state tell it from any other."""
_ODD = np.random.default_rng(2026).integers(0, 2**63, HASHED_WORDS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)

Table = npt.NDArray[np.int16]
"""[L, E, PARTS]: the shard of each part of each expert's tokens."""


def part_of(rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.intp]:
    """[T]: the part, 0 to PARTS - 1, that each row [T, bytes] is in, by a multiply-shift hash of its first bytes.

    Source: Dietzfelbinger, Hagerup, Katajainen, Penttonen 1997.
    """
    words = min(rows.shape[1] // 8, HASHED_WORDS)
    numbers = rows[:, : words * 8].view(np.uint64)  # [T, words]
    mixed = (numbers ^ (numbers >> np.uint64(32))) * _ODD[:words]
    return np.asarray((mixed.sum(axis=1, dtype=np.uint64) >> np.uint64(56)).astype(np.intp))


def table_of(
    plan: ExpertPlan, num_layers: int, num_experts: int, num_shards: int, usable: frozenset[int]
) -> Table | None:
    """Where each part of each expert's tokens goes; None: all of them home, as without a plan.

    Args:
        plan: which experts are split; it must be of `num_shards` shards.
        num_layers: L, the MoE layers.
        num_experts: E.
        num_shards: S.
        usable: shards whose workers have the copies; what is meant for others goes home.

    """
    experts = np.arange(num_experts, dtype=np.int16)
    table: Table = np.empty((num_layers, num_experts, PARTS), dtype=np.int16)
    table[:] = (experts % num_shards)[None, :, None]
    moved = False
    for expert in plan.experts:
        start = 0
        for shard, parts in expert.shards:
            if shard in usable and shard != expert.expert % num_shards:
                table[expert.layer, expert.expert, start : start + parts] = shard
                moved = True
            start += parts
    return table if moved else None
