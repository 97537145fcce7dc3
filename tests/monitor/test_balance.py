"""Plans that even the shards: properties for any load, the load of EPLB's example, and when one is made at all."""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.monitor.balance import (
    EVEN,
    Policy,
    balanced,
    copies,
    decide,
    experts_of,
    home_split,
    imbalance,
    loads,
    split_of,
)
from services.monitor.messages import PARTS, ExpertPlan, SplitExpert
from shared import wire

NOW = 1_767_225_600.5
POLICY = Policy(threshold=1.5, extra_experts=2, min_tokens=100, interval_seconds=60)
EPLB = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ],
    dtype=np.float64,
)
"""The load of the example in EPLB's README: 2 layers, 12 experts."""


@st.composite
def load(draw: st.DrawFn) -> tuple[npt.NDArray[np.float64], int, int]:
    """Tokens [L, E], shards, and slots per shard."""
    num_layers, num_experts = draw(st.integers(1, 3)), draw(st.integers(1, 16))
    rows = st.lists(st.integers(0, 2000), min_size=num_experts, max_size=num_experts)
    tokens = draw(st.lists(rows, min_size=num_layers, max_size=num_layers))
    return np.array(tokens, dtype=np.float64), draw(st.integers(1, 8)), draw(st.integers(0, 4))


def skewed(layers: int = 2, experts: int = 8, hot: float = 1000.0) -> npt.NDArray[np.float64]:
    tokens = np.full((layers, experts), 100.0)
    tokens[:, 0] = hot
    return tokens


@settings(max_examples=300)
@given(load())
def test_whatever_the_load_a_split_is_whole_within_its_slots_and_no_worse(
    case: tuple[npt.NDArray[np.float64], int, int],
) -> None:
    tokens, num_shards, extra = case
    home = home_split(tokens.shape[0], tokens.shape[1], num_shards)
    split = balanced(tokens, home, extra)
    assert (split >= 0).all()
    assert (split.sum(axis=2) == PARTS).all(), "every expert's tokens go somewhere, and once"
    assert copies(split).sum(axis=1).max(initial=0) <= extra
    assert imbalance(loads(tokens, split)) <= imbalance(loads(tokens, home)) + 1e-9
    assert np.allclose(loads(tokens, split).sum(axis=1), tokens.sum(axis=1)), "no token is lost or made"


@settings(max_examples=100)
@given(load())
def test_with_slots_enough_every_layer_becomes_even(case: tuple[npt.NDArray[np.float64], int, int]) -> None:
    tokens, num_shards, _ = case
    split = balanced(tokens, home_split(tokens.shape[0], tokens.shape[1], num_shards), tokens.shape[1])
    rounding = tokens.shape[1] * (tokens.max() / PARTS)
    shard_tokens = loads(tokens, split)
    assert (shard_tokens.max(axis=1) <= EVEN * shard_tokens.mean(axis=1) + rounding).all()
    assert copies(split).sum(axis=(1, 2)).max() <= 2 * num_shards + tokens.shape[1], "few copies do it"


@settings(max_examples=200)
@given(load())
def test_what_a_plan_says_is_read_back_as_it_was_meant(case: tuple[npt.NDArray[np.float64], int, int]) -> None:
    tokens, num_shards, extra = case
    split = balanced(tokens, home_split(tokens.shape[0], tokens.shape[1], num_shards), extra)
    plan = ExpertPlan(
        epoch=1, num_shards=num_shards, experts=experts_of(split), time=NOW, before=1.0, expected=1.0, reason=""
    )
    assert plan.fits(tokens.shape[0], tokens.shape[1], num_shards)
    again = wire.decode(ExpertPlan, wire.encode(plan))
    assert (split_of(again, tokens.shape[0], tokens.shape[1], num_shards) == split).all()
    assert (
        split_of(plan, tokens.shape[0], tokens.shape[1], num_shards + 1)
        == home_split(tokens.shape[0], tokens.shape[1], num_shards + 1)
    ).all()


@settings(max_examples=100)
@given(load())
def test_under_the_same_load_nothing_moves(case: tuple[npt.NDArray[np.float64], int, int]) -> None:
    tokens, num_shards, extra = case
    first = balanced(tokens, home_split(tokens.shape[0], tokens.shape[1], num_shards), extra)
    second = balanced(tokens, first, extra)
    assert not (copies(second) & ~copies(first)).any()


def test_a_little_more_or_less_load_moves_little() -> None:
    draw = np.random.default_rng(1)
    tokens = draw.zipf(1.5, (4, 64)).clip(max=500).astype(np.float64)
    first = balanced(tokens, home_split(4, 64, 8), 2)
    later = tokens * draw.uniform(0.9, 1.1, tokens.shape)
    second = balanced(later, first, 2)
    new = int((copies(second) & ~copies(first)).sum())
    assert imbalance(loads(later, second)) < 1.1
    assert new <= 0.2 * int(copies(first).sum())


@pytest.mark.parametrize(
    ("shards", "extra", "was", "most_copies", "least"),
    [(4, 1, 743 * 4 / 2189, 3, 1.05), (4, 2, 743 * 4 / 2189, 5, 1.01), (8, 2, 420 * 8 / 2189, 11, 1.06)],
)
def test_the_load_of_eplbs_example(shards: int, extra: int, was: float, most_copies: int, least: float) -> None:
    home = home_split(2, 12, shards)
    split = balanced(EPLB, home, extra)
    assert imbalance(loads(EPLB, home)) == pytest.approx(was)
    assert imbalance(loads(EPLB, split)) <= least
    assert copies(split).sum() <= most_copies


def test_one_expert_with_everything_is_split_among_all_shards() -> None:
    tokens = np.zeros((1, 8))
    tokens[0, 2] = 1000.0
    home = home_split(1, 8, 4)
    assert imbalance(loads(tokens, home)) == 4.0
    assert balanced(tokens, home, 1)[0, 2].tolist() == [64, 64, 64, 64]


def test_without_slots_all_stays_at_home() -> None:
    home = home_split(2, 8, 4)
    assert (balanced(skewed(), home, 0) == home).all()


def test_no_load_is_even() -> None:
    assert imbalance(np.zeros((2, 4))) == 1.0
    home = home_split(2, 8, 4)
    assert (balanced(np.zeros((2, 8)), home, 2) == home).all()


# -- when ------------------------------------------------------------------------------------------------------------


def test_a_plan_says_what_was_and_what_is_expected() -> None:
    plan = decide(skewed(), None, 4, POLICY, NOW)
    assert plan is not None
    assert (plan.epoch, plan.num_shards, plan.time) == (1, 4, NOW)
    assert plan.before == pytest.approx(1100 * 4 / 1700)
    assert plan.expected < 1.03
    assert plan.reason.startswith("the most loaded shard has 2.59 times the mean; 1.0")
    assert "expert 0 of MoE layer 0 to shards 0 (" in plan.reason


@pytest.mark.parametrize(
    ("tokens", "policy"),
    [
        (np.full((2, 8), 100.0), POLICY),
        (skewed() * 0.01, POLICY),
        (np.zeros((2, 8)), POLICY),
        (np.zeros((0, 0)), POLICY),
        (skewed(), Policy(threshold=3, extra_experts=2, min_tokens=100, interval_seconds=60)),
        (skewed(), Policy(threshold=1.5, extra_experts=0, min_tokens=100, interval_seconds=60)),
    ],
    ids=["even", "too few tokens", "no tokens", "nothing heard", "below the threshold", "nothing to gain"],
)
def test_no_plan_without_a_reason(tokens: npt.NDArray[np.float64], policy: Policy) -> None:
    assert decide(tokens, None, 4, policy, NOW) is None


def test_a_single_shard_is_even() -> None:
    assert decide(skewed(), None, 1, POLICY, NOW) is None


def test_a_plan_that_serves_is_kept_and_another_comes_no_sooner_than_allowed() -> None:
    plan = decide(skewed(), None, 4, POLICY, NOW)
    assert plan is not None
    assert decide(skewed(), plan, 4, POLICY, NOW + 3600) is None
    moved = np.roll(skewed(), 1, axis=1)
    assert decide(moved, plan, 4, POLICY, NOW + 59) is None
    after = decide(moved, plan, 4, POLICY, NOW + 60)
    assert after is not None
    assert after.epoch == 2
    assert after.expected < 1.03


def test_a_plan_that_is_lost_is_made_anew_above_all_epochs_in_use() -> None:
    after = decide(np.full((2, 8), 100.0), None, 4, POLICY, NOW, floor=7)
    assert after is not None
    assert (after.epoch, after.experts) == (8, ())
    assert "lost" in after.reason
    skew = decide(skewed(), None, 4, POLICY, NOW, floor=7)
    assert skew is not None
    assert skew.epoch == 8
    assert skew.experts
    assert decide(np.zeros((2, 8)), None, 4, POLICY, NOW, floor=7) is None, "nothing is known yet"


def test_of_two_plans_of_one_epoch_all_take_the_later() -> None:
    first, second = (decide(skewed(), None, 4, POLICY, NOW + late) for late in (0, 1))
    assert first is not None
    assert second is not None
    assert second.replaces(first)
    assert not first.replaces(second)
    assert first.replaces(None)


def test_a_plan_for_another_model_does_not_fit() -> None:
    plan = decide(skewed(), None, 4, POLICY, NOW)
    assert plan is not None
    assert plan.fits(2, 8, 4)
    assert not plan.fits(1, 8, 4)
    assert not plan.fits(2, 8, 5)
    tall = decide(np.roll(skewed(), -1, axis=1), None, 4, POLICY, NOW)
    assert tall is not None
    assert not tall.fits(2, 7, 4)


def test_a_plan_that_does_not_fit_says_nothing() -> None:
    plan = decide(skewed(), None, 4, POLICY, NOW)
    assert plan is not None
    beyond = SplitExpert(layer=0, expert=0, shards=((9, PARTS),))
    for wrong in (plan, msgspec.structs.replace(plan, num_shards=5, experts=(beyond,))):
        assert (split_of(wrong, 2, 8, 5) == home_split(2, 8, 5)).all()
    assert (split_of(plan, 1, 8, 4) == home_split(1, 8, 4)).all()
