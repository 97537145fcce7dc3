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


def said(prompt: int, known: int, new: int, cut: int) -> list[GenerateChunk]:
    """A router's chunks, that begins with `known` of `new` tokens and computes `cut` prompt tokens in a step."""
    chunks = [
        GenerateChunk(id="g", start=known, routing=rows(at, at + cut)) for at in range(0, prompt + known - cut, cut)
    ]
    first = len(chunks) * cut
    for n in range(known, new):
        reason = "length" if n == new - 1 else None
        chunks.append(
            GenerateChunk(id="g", start=n, token_ids=[n], routing=rows(first, prompt + n), finish_reason=reason)  # type: ignore[arg-type]
        )
        first = prompt + n
    return chunks


@given(
    prompt=st.integers(1, 9),
    new=st.integers(1, 6),
    tries=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 12), st.integers(0, 12)), max_size=4),
)
def test_tokens_and_rows_are_told_once_whatever_is_lost(
    prompt: int, new: int, tries: list[tuple[int, int, int]]
) -> None:
    progress = Progress(
        GenerateRequest(id="g", token_ids=[1] * prompt, max_tokens=new, return_routing=True),
    )
    told: list[int] = []
    tokens: list[int] = []
    for cut, missing, end in [*tries, (3, 99, 99)]:
        known = len(progress.next_try().output_ids)
        for number, chunk in enumerate(said(prompt, known, new, cut)):
            if number == end:
                break
            if number == missing:
                continue
            try:
                taken = progress.take(chunk)
            except MoeError as error:
                if error.code != "chunk_lost":
                    raise
                break
            told += [] if taken.routing is None else taken.routing.to_numpy()[:, 0, 0].tolist()
            tokens += taken.token_ids
        if len(tokens) == new:
            break
    assert tokens == list(range(new))
    assert told == list(range(prompt + new - 1))


def test_rows_of_a_prompt_alone_are_told_at_its_end() -> None:
    progress = Progress(request(return_routing=True))
    assert progress.take(GenerateChunk(id="g", routing=rows(0, 1))).routing is None
    whole = progress.take(GenerateChunk(id="g", routing=rows(1, 2), finish_reason="length")).routing
    assert whole is not None
    assert whole.to_numpy()[:, 0, 0].tolist() == [0, 1]
    progress.next_try()
    with pytest.raises(MoeError, match="of 2 rows of routing 1") as caught:
        progress.take(GenerateChunk(id="g", routing=rows(1, 2), finish_reason="length"))
    assert caught.value.code == "chunk_lost"
