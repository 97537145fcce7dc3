"""Which copy of a hot expert computes a token: by its hidden state alone, in the plan's proportions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from services.monitor.messages import PARTS, ExpertPlan, SplitExpert
from services.router.splitting import part_of, table_of


def bytes_of(rows: torch.Tensor) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    return rows.view(torch.uint8).numpy()


def plan(*experts: SplitExpert) -> ExpertPlan:
    return ExpertPlan(epoch=1, num_shards=4, experts=experts, time=0.0, before=2.0, expected=1.0, reason="")


SPLIT = plan(
    SplitExpert(layer=0, expert=4, shards=((0, 64), (1, 96), (3, 96))),
    SplitExpert(layer=1, expert=5, shards=((2, PARTS),)),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [8, 32, 64, 250])
def test_every_part_gets_its_share_of_the_rows(dtype: torch.dtype, width: int) -> None:
    rows = torch.randn(40 * PARTS, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    counts = np.bincount(part_of(bytes_of(rows)), minlength=PARTS)
    assert counts.size == PARTS
    quarters = counts.reshape(4, -1).sum(axis=1) / counts.sum()
    assert np.abs(quarters - 0.25).max() < 0.02
    assert counts.min() > 0


def test_a_rows_part_does_not_depend_on_the_others_or_on_where_it_lies() -> None:
    rows = torch.randn(50, 64)
    together = part_of(bytes_of(rows))
    assert [int(part_of(bytes_of(rows[n : n + 1]))[0]) for n in range(50)] == together.tolist()
    assert part_of(bytes_of(rows.flip(0))).tolist() == together[::-1].tolist()


def test_rows_that_are_too_short_to_be_told_apart_are_all_of_one_part() -> None:
    assert part_of(bytes_of(torch.randn(5, 3, dtype=torch.float16))).tolist() == [0] * 5


def test_a_table_has_the_plans_parts_and_all_else_at_home() -> None:
    table = table_of(SPLIT, 2, 8, 4, frozenset(range(4)))
    assert table is not None
    assert table.shape == (2, 8, PARTS)
    assert np.bincount(table[0, 4]).tolist() == [64, 96, 0, 96]
    assert set(table[1, 5]) == {2}
    for layer, expert in ((0, 0), (0, 5), (1, 4), (1, 7)):
        assert set(table[layer, expert]) == {expert % 4}


def test_what_is_for_a_shard_without_copies_goes_home() -> None:
    table = table_of(SPLIT, 2, 8, 4, frozenset([0, 3]))
    assert table is not None
    assert np.bincount(table[0, 4]).tolist() == [160, 0, 0, 96]
    assert set(table[1, 5]) == {1}


def test_when_all_goes_home_there_is_no_table() -> None:
    assert table_of(SPLIT, 2, 8, 4, frozenset()) is None
    assert table_of(SPLIT, 2, 8, 4, frozenset([0])) is None
    assert table_of(plan(), 2, 8, 4, frozenset(range(4))) is None
