"""Which shards hold copies of hot experts, and which part of their tokens each takes. Pure; the clock is passed in.

In the manner of DeepSeek's EPLB (https://github.com/deepseek-ai/EPLB): the heaviest experts of the fullest shards are
copied until the shards are even or their slots are full. Two things differ, as our router splits tokens one by one:
the copies of an expert need not take equal parts, so few copies do; and home copies (expert e in shard e mod S) stay
where they are, so that a plan can only add, and nobody depends on having heard of it.

A *split* is an int array [L, E, S]: of L MoE layers' E experts, how many of PARTS parts of their tokens each of S
shards takes. docs/decisions/0020-balance.md says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.monitor.messages import PARTS, ExpertPlan, SplitExpert

EVEN = 1.02
"""A shard with so much of the mean is full enough: the rest would be noise, at the cost of copies."""
AS_GOOD = 1.02
"""Copies stay where they are unless others make the shards so much more even."""
CLEARLY_BETTER = 0.9
"""A plan is told only if it brings the imbalance to so much of what it was."""

Tokens = npt.NDArray[np.float64]
"""[L, E]: tokens per MoE layer and expert."""
Split = npt.NDArray[np.int64]
"""[L, E, S], each expert's parts adding up to PARTS."""


@dataclass(frozen=True)
class Policy:
    """When a plan is made, and what it may cost."""

    threshold: float
    """The imbalance above which one is made."""
    extra_experts: int
    """The most copies that a shard may hold beside its own experts, in each layer."""
    min_tokens: float
    """The least tokens per layer that are known of."""
    interval_seconds: float
    """The least time between two plans."""


def home_split(num_layers: int, num_experts: int, num_shards: int) -> Split:
    """Without a plan: all of expert e in shard e mod S."""
    split = np.zeros((num_layers, num_experts, num_shards), dtype=np.int64)
    experts = np.arange(num_experts)
    split[:, experts, experts % num_shards] = PARTS
    return split


def split_of(plan: ExpertPlan | None, num_layers: int, num_experts: int, num_shards: int) -> Split:
    """What `plan` says; without one, or with one for another model or number of shards, what holds without a plan."""
    split = home_split(num_layers, num_experts, num_shards)
    if plan is not None and plan.fits(num_layers, num_experts, num_shards):
        for expert in plan.experts:
            split[expert.layer, expert.expert] = 0
            for shard, parts in expert.shards:
                split[expert.layer, expert.expert, shard] = parts
    return split


def experts_of(split: Split) -> tuple[SplitExpert, ...]:
    """The experts that are not wholly at home: what a plan says of `split`."""
    moved = np.argwhere((split != home_split(*split.shape)).any(axis=2))
    return tuple(
        SplitExpert(
            layer=layer,
            expert=expert,
            shards=tuple((int(s), int(split[layer, expert, s])) for s in np.flatnonzero(split[layer, expert])),
        )
        for layer, expert in moved.tolist()
    )


def loads(tokens: Tokens, split: Split) -> npt.NDArray[np.float64]:
    """[L, S]: the tokens that each shard gets."""
    return np.asarray(np.einsum("le,les->ls", tokens, split / PARTS))


def imbalance(shard_tokens: npt.NDArray[np.float64]) -> float:
    """The most loaded shard over the mean, 1 to S; 1 if there is no load.

    Each layer waits for its most loaded shard, so layers count by their load.

    Args:
        shard_tokens: [L, S].

    """
    total = float(shard_tokens.sum())
    if not total:
        return 1.0
    return float(shard_tokens.max(axis=1).sum() * shard_tokens.shape[1]) / total


def copies(split: Split) -> npt.NDArray[np.bool_]:
    """[L, E, S]: who holds a copy beside the expert's own shard."""
    held = split > 0
    experts = np.arange(split.shape[1])
    held[:, experts, experts % split.shape[2]] = False
    return np.asarray(held)


def balanced(tokens: Tokens, before: Split, extra_experts: int) -> Split:
    """A split under which the shards' loads are as even as `extra_experts` copies per shard and layer make them.

    Args:
        tokens: [L, E].
        before: the split that holds now; its copies are kept where others are no better.
        extra_experts: the most copies per shard and layer, beside the shard's own experts.

    """
    kept = _balanced(tokens, copies(before), extra_experts)
    anew = _balanced(tokens, np.zeros_like(copies(before)), extra_experts)
    best = imbalance(loads(tokens, anew))
    return kept if imbalance(loads(tokens, kept)) <= AS_GOOD * best else anew


def _balanced(tokens: Tokens, held: npt.NDArray[np.bool_], extra_experts: int) -> Split:
    split = home_split(*held.shape)
    for layer, row in enumerate(tokens):
        if row.sum() > 0:
            placed = _layer(row, held[layer], extra_experts)
            split[layer] = _whole_parts(placed, row)
    return split


def _layer(tokens: npt.NDArray[np.float64], held: npt.NDArray[np.bool_], extra: int) -> npt.NDArray[np.float64]:
    """[E, S]: the tokens of each expert that each shard takes.

    From the fullest shard to the emptiest that may take some: of the expert with most tokens there, as many as the
    one has too many and the other too few. Each step so evens a shard, or moves all of an expert.

    Args:
        tokens: [E].
        held: [E, S], copies that are there already, and so cost nothing.
        extra: the most copies per shard.

    """
    num_experts, num_shards = held.shape
    experts = np.arange(num_experts)
    home = experts % num_shards
    placed = np.zeros((num_experts, num_shards))
    placed[experts, home] = tokens
    mean = tokens.sum() / num_shards
    stuck: set[int] = set()
    for _ in range(num_experts * num_shards):
        load = placed.sum(axis=0)
        hot = max((s for s in range(num_shards) if s not in stuck), key=lambda s: load[s], default=-1)
        if hot < 0 or load[hot] <= EVEN * mean:
            break
        move = _move(placed, load, mean, hot, held, extra)
        if move is None:
            stuck.add(hot)
            continue
        expert, cold = move
        amount = min(placed[expert, hot], load[hot] - mean, mean - load[cold])
        placed[expert, hot] -= amount
        placed[expert, cold] += amount
    return placed


def _move(
    placed: npt.NDArray[np.float64],
    load: npt.NDArray[np.float64],
    mean: float,
    hot: int,
    held: npt.NDArray[np.bool_],
    extra: int,
) -> tuple[int, int] | None:
    """Which expert of `hot` to give tokens of to which shard; where it has a copy already, if there is such a shard."""
    num_experts, num_shards = placed.shape
    home = np.arange(num_experts) % num_shards
    used = [int(((placed[:, s] > 0) & (home != s)).sum()) for s in range(num_shards)]
    cold = [int(s) for s in np.argsort(load, kind="stable") if load[s] < mean * (2 - EVEN)]
    by_tokens = [int(e) for e in np.argsort(-placed[:, hot], kind="stable") if placed[e, hot] > 0]
    new: tuple[int, int] | None = None
    for shard in cold:
        for expert in by_tokens:
            if home[expert] == shard or placed[expert, shard] > 0:
                return expert, shard
            if used[shard] < extra:
                if held[expert, shard]:
                    return expert, shard
                new = new or (expert, shard)
    return new


def _whole_parts(placed: npt.NDArray[np.float64], tokens: npt.NDArray[np.float64]) -> Split:
    """[E, S]: `placed` in PARTS parts per expert, by largest remainders."""
    num_experts, num_shards = placed.shape
    split = home_split(1, num_experts, num_shards)[0]
    for expert in np.flatnonzero(tokens):
        exact = placed[expert] / tokens[expert] * PARTS
        parts = np.floor(exact + 1e-9).astype(np.int64)
        missing = PARTS - int(parts.sum())
        parts[np.argsort(parts - exact, kind="stable")[:missing]] += 1
        split[expert] = parts
    return np.asarray(split)


def is_due(
    tokens: Tokens, plan: ExpertPlan | None, num_shards: int, policy: Policy, now: float, *, floor: int = 0
) -> bool:
    """Whether it is time for a plan, if a better one can be made; arguments as of `decide`, and much cheaper."""
    if float(tokens.sum(axis=1).max(initial=0.0)) < policy.min_tokens:
        return False
    if floor > (plan.epoch if plan else 0):
        return True
    if plan is not None and now - plan.time < policy.interval_seconds:
        return False
    split = split_of(plan, tokens.shape[0], tokens.shape[1], num_shards)
    return imbalance(loads(tokens, split)) > policy.threshold


def decide(
    tokens: Tokens, plan: ExpertPlan | None, num_shards: int, policy: Policy, now: float, *, floor: int = 0
) -> ExpertPlan | None:
    """The plan to tell; None to leave all as it is.

    Args:
        tokens: [L, E], the moving average of each expert's load.
        plan: the one that holds; None: none that we know of.
        num_shards: S.
        policy: when, and at what cost.
        now: Unix seconds.
        floor: the highest epoch in use. If that is above `plan`'s, what it said is lost: one is made anew.

    """
    if not is_due(tokens, plan, num_shards, policy, now, floor=floor):
        return None
    epoch = plan.epoch if plan else 0
    lost = floor > epoch
    before = split_of(plan, tokens.shape[0], tokens.shape[1], num_shards)
    was = imbalance(loads(tokens, before))
    after = balanced(tokens, before, policy.extra_experts) if was > policy.threshold else before
    expected = imbalance(loads(tokens, after))
    if not lost and expected > CLEARLY_BETTER * was:
        return None
    return ExpertPlan(
        epoch=max(floor, epoch) + 1,
        num_shards=num_shards,
        experts=experts_of(after),
        time=now,
        before=was,
        expected=expected,
        reason=("what was told before is lost; " if lost else "") + _reason(was, expected, before, after, tokens),
    )


def _reason(was: float, expected: float, before: Split, after: Split, tokens: Tokens) -> str:
    had, has = copies(before), copies(after)
    return (
        f"the most loaded shard has {was:.2f} times the mean; {expected:.2f} expected with "
        f"{_counted(int((has & ~had).sum()))} more, {int((had & ~has).sum())} fewer, {int((had & has).sum())} kept"
        f"{_hottest(after, tokens)}"
    )


def _counted(number: int) -> str:
    return f"{number} copy" if number == 1 else f"{number} copies"


def _hottest(split: Split, tokens: Tokens, most: int = 3) -> str:
    """Where the tokens of the heaviest experts go, for people."""
    experts: Sequence[SplitExpert] = experts_of(split)
    if not experts:
        return ""
    shown = sorted(experts, key=lambda e: -tokens[e.layer, e.expert])[:most]
    parts = [
        f"expert {e.expert} of MoE layer {e.layer} to shards "
        + ", ".join(f"{shard} ({100 * n / PARTS:.0f} %)" for shard, n in e.shards)
        for e in shown
    ]
    more = f" and {len(experts) - most} more" if len(experts) > most else ""
    return ": " + "; ".join(parts) + more
