"""A prompt's share of the steps in which others decode follows from how long steps take."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.prefill_pace import LEAST_TOKENS, STRETCH, PrefillPace


def paced(decode_seconds: float, token_seconds: float, most: int = 256) -> PrefillPace:
    """One that has seen steps of a machine with these times."""
    pace = PrefillPace(most)
    for _ in range(50):
        pace.observe(16, 0, decode_seconds)
        pace.observe(16, 32, decode_seconds + 32 * token_seconds)
    return pace


def test_with_nobody_to_hold_up_a_prompt_gets_all() -> None:
    assert PrefillPace(256).budget(decoding=0, prefilling=3) == 256
    assert paced(0.01, 1.0).budget(decoding=0, prefilling=3) == 256


def test_before_anything_is_known_a_prompt_gets_all() -> None:
    assert PrefillPace(256).budget(decoding=15, prefilling=1) == 256


@pytest.mark.parametrize(("decode_seconds", "token_seconds"), [(0.1, 0.002), (0.02, 0.0002)])
def test_a_step_with_prompt_tokens_takes_no_longer_than_the_stretch(
    decode_seconds: float, token_seconds: float
) -> None:
    tokens = paced(decode_seconds, token_seconds).budget(decoding=15, prefilling=1)
    step = decode_seconds + tokens * token_seconds
    assert step <= STRETCH * decode_seconds + token_seconds
    assert step >= STRETCH * decode_seconds - 2 * token_seconds


def test_where_more_wait_than_decode_the_few_give_way() -> None:
    pace = paced(0.1, 0.004)
    assert pace.budget(decoding=8, prefilling=8) == pace.budget(decoding=15, prefilling=1) == 25
    assert pace.budget(decoding=2, prefilling=14) == 175
    assert pace.budget(decoding=1, prefilling=15) == 256


def test_a_prompt_always_goes_on() -> None:
    assert paced(0.001, 1.0).budget(decoding=15, prefilling=1) == LEAST_TOKENS
    assert paced(0.001, 1.0, most=4).budget(decoding=15, prefilling=1) == 4


def test_it_follows_a_machine_that_becomes_slower() -> None:
    pace = paced(0.1, 0.001)
    before = pace.budget(decoding=15, prefilling=1)
    for _ in range(50):
        pace.observe(16, 32, 0.1 + 32 * 0.004)
    assert pace.budget(decoding=15, prefilling=1) < before / 2


@given(
    st.lists(st.tuples(st.integers(0, 64), st.integers(0, 512), st.floats(0, 100)), max_size=30), st.integers(1, 999)
)
def test_whatever_steps_took_the_budget_keeps_its_bounds(steps: list[tuple[int, int, float]], most: int) -> None:
    pace = PrefillPace(most)
    for decode_tokens, prompt_tokens, seconds in steps:
        pace.observe(decode_tokens, prompt_tokens, seconds)
        assert min(LEAST_TOKENS, most) <= pace.budget(decoding=15, prefilling=1) <= most
