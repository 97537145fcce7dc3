"""Sampling against transformers' logits processors: which tokens can be drawn, how often, and what changes them."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from services.router.messages import GenerateRequest, Sampling
from services.router.sampling import _draw, logprobs, penalize, sample, uniform
from services.router.sequence import Sequence

VOCAB = 12
GRID = 4000
DRAWS = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
"""Evenly spaced: what they draw is the distribution itself, to within 1 / GRID per edge."""
CHI_SQUARE_11 = 31.26
"""99.9 % of chi-square values with 11 degrees of freedom lie below it."""


def sequence(sampling: Sampling, prompt: list[int] | None = None, output: list[int] | None = None) -> Sequence:
    request = GenerateRequest(
        id="a", token_ids=prompt or [0], output_ids=output or [], max_tokens=100, sampling=sampling
    )
    return Sequence(request, 0.0)


def random_logits(seed: int, rows: int = 1, vocab: int = VOCAB) -> torch.Tensor:
    """[rows, vocab] float32"""
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def expected_probabilities(logits: torch.Tensor, s: Sampling, seen: list[int]) -> torch.Tensor:
    """[V]: what transformers would draw from, `logits` [V] being the model's."""
    scores = logits.double()[None]
    ids = torch.tensor([seen])
    processors: list[Any] = []
    if s.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    processors.append(TemperatureLogitsWarper(s.temperature))
    if s.top_k:
        processors.append(TopKLogitsWarper(s.top_k))
    processors += [TopPLogitsWarper(s.top_p), MinPLogitsWarper(s.min_p)]
    for processor in processors:
        scores = processor(ids, scores)
    return torch.softmax(scores, dim=-1)[0]


def drawn_shares(logits: torch.Tensor, s: Sampling) -> torch.Tensor:
    """[V]: the share of the grid's draws that fall on each token."""
    tokens = _draw(logits.expand(GRID, -1), [s] * GRID, DRAWS)
    return torch.bincount(tokens, minlength=logits.shape[-1]).double() / GRID


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.3),
        Sampling(temperature=3.0),
        Sampling(top_k=1),
        Sampling(top_k=4),
        Sampling(top_k=1000),
        Sampling(top_p=0.05),
        Sampling(top_p=0.7),
        Sampling(min_p=0.2),
        Sampling(min_p=1.0),
        Sampling(temperature=1.7, top_k=7, top_p=0.9, min_p=0.1),
    ],
    ids=str,
)
def test_the_tokens_that_can_be_drawn_are_those_that_transformers_leaves(sampling: Sampling) -> None:
    for seed in range(5):
        logits = random_logits(seed)
        want = expected_probabilities(logits[0], sampling, [0])
        got = drawn_shares(logits, sampling)
        # What is rarer than the grid is fine may be missed by it; what cannot be drawn must never be.
        assert set(got.nonzero().flatten().tolist()) <= set(want.nonzero().flatten().tolist())
        assert set((want > 2 / GRID).nonzero().flatten().tolist()) <= set(got.nonzero().flatten().tolist())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocab=st.integers(2, 40),
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 45),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 0.99),
)
def test_tokens_are_drawn_as_often_as_transformers_says(
    seed: int, vocab: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = random_logits(seed, vocab=vocab)
    want = expected_probabilities(logits[0], sampling, [0])
    assert (drawn_shares(logits, sampling) - want).abs().max() <= 2 / GRID


def test_many_seeds_draw_the_distribution() -> None:
    logits = random_logits(3)
    sampling = Sampling(temperature=1.5)
    want = expected_probabilities(logits[0], sampling, [0])
    many = 6000
    sequences = [sequence(Sampling(temperature=1.5, seed=seed)) for seed in range(many)]
    tokens = sample(logits.repeat(many, 1), sequences)
    counts = torch.bincount(torch.tensor(tokens), minlength=VOCAB).double()
    assert float(((counts - many * want) ** 2 / (many * want)).sum()) < CHI_SQUARE_11


def test_the_positions_of_one_seed_draw_the_distribution_too() -> None:
    logits = random_logits(4)
    want = expected_probabilities(logits[0], Sampling(), [0])
    many = 6000
    sequences = [sequence(Sampling(seed=7), prompt=[0] * (1 + n)) for n in range(many)]
    tokens = sample(logits.repeat(many, 1), sequences)
    counts = torch.bincount(torch.tensor(tokens), minlength=VOCAB).double()
    assert float(((counts - many * want) ** 2 / (many * want)).sum()) < CHI_SQUARE_11


def test_the_ends_of_the_unit_interval_draw_the_lowest_and_the_highest_token_that_is_left() -> None:
    draws = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for seed in range(20):
        logits = random_logits(seed)
        left = logits[0].topk(3).indices.tolist()
        assert _draw(logits.expand(2, -1), [Sampling(top_k=3)] * 2, draws).tolist() == [min(left), max(left)]


def test_a_last_bit_that_differs_changes_no_draw_between_equally_likely_tokens() -> None:
    # What else is in the batch may change a logit's last bit: that must not reorder the tokens.
    logits = torch.zeros(2, 2)
    logits[0, 0] = logits[1, 1] = 1e-7
    for seed in range(50):
        assert len(set(sample(logits.clone(), [sequence(Sampling(seed=seed))] * 2))) == 1


def test_a_draw_that_rounds_onto_the_end_takes_the_last_token_that_is_left() -> None:
    logits = random_logits(6)
    left = logits[0].topk(4).indices.tolist()
    assert _draw(logits, [Sampling(top_k=4)], torch.ones(1, dtype=torch.float64)).tolist() == [max(left)]


def test_one_token_is_left_when_all_others_are_impossible() -> None:
    logits = torch.full((1, VOCAB), -math.inf)
    logits[0, 5] = 1.0
    draws = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert _draw(logits, [Sampling()], draws).tolist() == [5]


# -- penalties -----------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 1000),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8),
    output=st.lists(st.integers(0, VOCAB - 1), max_size=8),
    penalty=st.floats(0.2, 5),
)
def test_the_repetition_penalty_is_that_of_transformers(
    seed: int, prompt: list[int], output: list[int], penalty: float
) -> None:
    logits = random_logits(seed)
    want = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output]), logits.clone())
    penalize(logits[0], sequence(Sampling(repetition_penalty=penalty), prompt, output))
    assert torch.allclose(logits, want, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 1000),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8),
    output=st.lists(st.integers(0, VOCAB - 1), max_size=12),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
)
def test_presence_and_frequency_penalties_follow_openais_formula(
    seed: int, prompt: list[int], output: list[int], presence: float, frequency: float
) -> None:
    logits = random_logits(seed)
    counts = torch.tensor([float(output.count(token)) for token in range(VOCAB)])
    want = logits - counts * frequency - (counts > 0).float() * presence
    penalize(logits[0], sequence(Sampling(presence_penalty=presence, frequency_penalty=frequency), prompt, output))
    assert torch.allclose(logits, want, atol=1e-5)


def test_a_bias_is_added_to_its_own_tokens_logit() -> None:
    logits = random_logits(0)
    want = logits.clone()
    want[0, 3] += 2.5
    want[0, 9] -= 100
    penalize(logits[0], sequence(Sampling(logit_bias={3: 2.5, 9: -100.0})))
    assert torch.equal(logits, want)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_of_100_forces_a_token_and_of_minus_100_bans_it(temperature: float) -> None:
    for seed in range(50):
        logits = random_logits(seed)
        likely = int(logits.argmax())
        forced = sequence(Sampling(temperature=temperature, seed=seed, logit_bias={4: 100.0}))
        assert sample(logits.clone(), [forced]) == [4]
        banned = sequence(Sampling(temperature=temperature, seed=seed, logit_bias={likely: -100.0}))
        assert sample(logits.clone(), [banned]) != [likely]


def test_all_penalties_together_then_the_warpers() -> None:
    sampling = Sampling(
        temperature=0.8,
        top_p=0.9,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.2,
        logit_bias={1: 1.5},
    )
    prompt, output = [2, 3], [3, 5, 5]
    logits = random_logits(8)
    penalized = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt + output]), logits.clone())
    for token in set(output):
        penalized[0, token] -= 0.4 + 0.2 * output.count(token)
    penalized[0, 1] += 1.5
    want = expected_probabilities(penalized[0], Sampling(temperature=0.8, top_p=0.9), prompt)
    penalize(logits[0], sequence(sampling, prompt, output))
    assert (drawn_shares(logits, sampling) - want).abs().max() <= 2 / GRID


# -- greedy, seeds, batches --------------------------------------------------------------------------------------------


def test_temperature_0_takes_the_most_likely_token_after_penalties_whatever_the_seed() -> None:
    logits = random_logits(1)
    first, second = logits[0].topk(2).indices.tolist()
    for seed in range(20):
        greedy = Sampling(temperature=0, top_p=0.3, top_k=5, min_p=0.5, seed=seed)
        assert sample(logits.clone(), [sequence(greedy)]) == [first]
    gap = float(logits[0, first] - logits[0, second])
    assert gap < 2
    punished = sequence(Sampling(temperature=0, presence_penalty=2), output=[first])
    assert sample(logits.clone(), [punished]) == [second]


def test_a_uniform_number_depends_on_seed_and_position_and_nothing_else() -> None:
    numbers = [uniform(seed, position) for seed in range(40) for position in range(40)]
    assert numbers == [uniform(seed, position) for seed in range(40) for position in range(40)]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 for number in numbers)
    assert uniform(2**63 - 1, 10**6) == uniform(2**63 - 1, 10**6)


def test_uniform_numbers_stay_the_same_from_release_to_release() -> None:
    # Two routers of different versions must continue a seeded generation alike.
    assert (uniform(0, 0), uniform(1, 0), uniform(0, 1)) == (
        0.0564663990004608,
        0.6487508310490744,
        0.44008326622012284,
    )


def test_uniform_numbers_fill_the_unit_interval_evenly() -> None:
    buckets = Counter(int(uniform(seed, position) * VOCAB) for seed in range(60) for position in range(100))
    want = 6000 / VOCAB
    assert sum((buckets[bucket] - want) ** 2 / want for bucket in range(VOCAB)) < CHI_SQUARE_11


@st.composite
def samplings(draw: st.DrawFn) -> Sampling:
    return Sampling(
        temperature=draw(st.sampled_from([0.0, 0.7, 1.0, 2.0])),
        top_k=draw(st.integers(0, VOCAB)),
        top_p=draw(st.floats(0.1, 1)),
        min_p=draw(st.floats(0, 0.5)),
        seed=draw(st.integers(0, 2**63 - 1)),
        presence_penalty=draw(st.sampled_from([0.0, 1.0])),
        frequency_penalty=draw(st.sampled_from([0.0, -0.5])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.4])),
        logit_bias=draw(st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-5, 5), max_size=3)),
    )


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(samplings(), st.lists(st.integers(0, VOCAB - 1), max_size=5), st.integers(0, 99)), min_size=1
    ),
    order=st.randoms(use_true_random=False),
)
def test_a_token_does_not_depend_on_the_other_rows_of_the_batch(
    rows: list[tuple[Sampling, list[int], int]], order: Any
) -> None:
    sequences = [sequence(sampling, output=output) for sampling, output, _ in rows]
    logits = torch.cat([random_logits(seed) for _, _, seed in rows])
    alone = [sample(logits[i : i + 1].clone(), [s])[0] for i, s in enumerate(sequences)]
    shuffled = list(range(len(rows)))
    order.shuffle(shuffled)
    together = sample(logits[shuffled], [sequences[i] for i in shuffled])
    assert together == [alone[i] for i in shuffled]


# -- log-probabilities -------------------------------------------------------------------------------------------------


def test_logprobs_are_those_of_log_softmax() -> None:
    logits = random_logits(2, rows=5)
    tokens = [int(row.argmax()) if i % 2 else int(row.argmin()) for i, row in enumerate(logits)]
    want = torch.log_softmax(logits.double(), dim=-1)
    for row, (token, value) in enumerate(zip(tokens, logprobs(logits, tokens, [0, 1, 3, 20, 0]), strict=True)):
        assert value.token == token
        assert value.logprob == pytest.approx(float(want[row, token]), abs=1e-5)
        assert value.rank == (1 if row % 2 else VOCAB)
        count = min([0, 1, 3, 20, 0][row], VOCAB)
        assert len(value.top) == count
        best = want[row].topk(count)
        assert [t for t, _ in value.top] == best.indices.tolist()
        assert [score for _, score in value.top] == pytest.approx(best.values.tolist(), abs=1e-5)
