"""What is told once is told once: chunks of several tries at one generation, put together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.progress import MOST_LOSSES, Progress
from services.router.messages import GenerateChunk, GenerateRequest, TokenLogprob
from shared.errors import MoeError
from shared.wire import Tensor


def request(**more: object) -> GenerateRequest:
    return GenerateRequest(id="g", token_ids=[1, 2], max_tokens=9, **more)  # type: ignore[arg-type]


def rows(first: int, last: int) -> Tensor:
    """Routing [n, 1, 2] whose rows say where they belong."""
    return Tensor.from_numpy(np.array([[[n, n]] for n in range(first, last)], dtype=np.int32))


def test_a_try_begins_with_what_is_known() -> None:
    progress = Progress(request(prompt_logprobs=0))
    assert progress.next_try() == request(prompt_logprobs=0)
    progress.take(GenerateChunk(id="g", token_ids=[5], prompt_logprobs=[None, TokenLogprob(2, -1.0, 1)]))
    again = progress.next_try()
    assert (again.id, again.output_ids, again.prompt_logprobs) == ("g.1", [5], -1)
    assert again.max_tokens == 9


def test_what_is_known_is_not_told_twice() -> None:
    progress = Progress(request())
    progress.take(GenerateChunk(id="g", token_ids=[5, 6]))
    scores = [TokenLogprob(token, -1.0, 1) for token in (6, 7)]
    chunk = progress.take(GenerateChunk(id="g", token_ids=[6, 7], start=1, logprobs=scores))
    assert (chunk.start, chunk.token_ids, chunk.logprobs) == (2, [7], scores[1:])
    assert progress.tokens == [5, 6, 7]


def test_a_gap_is_an_error() -> None:
    progress = Progress(request())
    with pytest.raises(MoeError, match="2 tokens") as caught:
        progress.take(GenerateChunk(id="g", token_ids=[5], start=2))
    assert caught.value.code == "chunk_lost"


def test_what_was_degraded_once_stays_so() -> None:
    progress = Progress(request())
    assert progress.take(GenerateChunk(id="g", token_ids=[5], degraded=True)).degraded
    progress.next_try()
    assert progress.take(GenerateChunk(id="g", token_ids=[6], start=1)).degraded


def test_a_new_token_forgives_the_losses_before_it() -> None:
    progress = Progress(request())
    for _ in range(3):
        assert all(progress.lost() for _ in range(MOST_LOSSES))
        progress.take(GenerateChunk(id="g", token_ids=[5], start=len(progress.tokens)))
    assert [progress.lost() for _ in range(MOST_LOSSES + 1)] == [True] * MOST_LOSSES + [False]


@given(st.integers(1, 12), st.lists(st.integers(1, 5), min_size=1, max_size=8), st.integers(0, 10))
def test_rows_of_routing_are_told_once_however_the_tries_cut_them(total: int, cuts: list[int], stop: int) -> None:
    progress = Progress(request(return_routing=True))
    told: list[int] = []

    def hear(last: int) -> None:
        progress.next_try()
        first, turn = 0, 0
        while first < last:
            end = min(first + cuts[turn % len(cuts)], last)
            chunk = progress.take(GenerateChunk(id="g", routing=rows(first, end)))
            told.extend([] if chunk.routing is None else chunk.routing.to_numpy()[:, 0, 0].tolist())
            first, turn = end, turn + 1

    hear(min(stop, total))
    cuts.reverse()
    hear(total)
    assert told == list(range(total))
