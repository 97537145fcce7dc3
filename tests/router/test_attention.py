"""Attention over the paged cache against a dense loop: grouped heads, sliding windows, chunks, scattered blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.attention import attend
from services.router.batch import Batch, Span, build_batch

CPU = torch.device("cpu")
NEVER = 2**62
DIM = 8


@dataclass(frozen=True)
class Layout:
    """Sequences in a cache: the span of each that is computed now, and the keys and values of all its positions."""

    spans: list[Span]
    own: list[tuple[torch.Tensor, torch.Tensor]]
    """Per span: [end, kv, D] twice."""
    keys: torch.Tensor
    """[slots, kv, D]; NaN wherever nobody wrote, but for block 0, which is zero."""
    values: torch.Tensor


def layout(pieces: list[tuple[int, int]], block_tokens: int, kv_heads: int, seed: int) -> Layout:
    """A cache with a sequence for each (start, count), its blocks scattered; single tokens first."""
    generator = torch.Generator().manual_seed(seed)
    pieces = sorted(pieces, key=lambda piece: piece[1] > 1)
    counts = [-(-(start + count) // block_tokens) + 1 for start, count in pieces]
    total = sum(counts)
    numbers = (torch.randperm(total, generator=generator) + 1).tolist()
    slots = (total + 1) * block_tokens
    keys, values = torch.full((2, slots, kv_heads, DIM), math.nan)
    keys[:block_tokens] = values[:block_tokens] = 0
    spans, own = [], []
    for (start, count), blocks in zip(pieces, counts, strict=True):
        mine, numbers = numbers[:blocks], numbers[blocks:]
        spans.append(Span([0] * count, start, start + count, mine, NEVER))
        k, v = torch.randn(2, start + count, kv_heads, DIM, generator=generator)
        own.append((k, v))
        for position in range(start + count):
            slot = mine[position // block_tokens] * block_tokens + position % block_tokens
            keys[slot], values[slot] = k[position], v[position]
    return Layout(spans, own, keys, values)


def dense(query: torch.Tensor, layout: Layout, window: int | None) -> torch.Tensor:
    """[T, heads × D]: each row and head by itself, softmax written out."""
    rows = []
    heads = query.shape[1]
    row = 0
    for span, (keys, values) in zip(layout.spans, layout.own, strict=True):
        groups = heads // keys.shape[1]
        for position in range(span.start, span.end):
            first = 0 if window is None else max(0, position - window + 1)
            out = []
            for head in range(heads):
                k, v = keys[first : position + 1, head // groups], values[first : position + 1, head // groups]
                weights = torch.softmax(k @ query[row, head] / math.sqrt(DIM), dim=0)
                out.append(weights @ v)
            rows.append(torch.cat(out))
            row += 1
    return torch.stack(rows)


@settings(max_examples=80, deadline=None)
@given(
    pieces=st.lists(st.tuples(st.integers(0, 20), st.one_of(st.just(1), st.integers(1, 12))), min_size=1, max_size=6),
    block_tokens=st.integers(1, 7) | st.just(64),
    kv_heads=st.sampled_from([1, 2, 4]),
    window=st.none() | st.integers(1, 15),
    seed=st.integers(0, 999),
)
def test_attention_over_blocks_equals_a_dense_loop(
    pieces: list[tuple[int, int]], block_tokens: int, kv_heads: int, window: int | None, seed: int
) -> None:
    cache = layout(pieces, block_tokens, kv_heads, seed)
    batch = build_batch(cache.spans, block_tokens, CPU)
    query = torch.randn(batch.size, 4, DIM, generator=torch.Generator().manual_seed(seed + 1))
    got = attend(query, cache.keys, cache.values, batch, window)
    assert got.shape == (batch.size, 4 * DIM)
    assert torch.allclose(got, dense(query, cache, window), atol=1e-5)


def test_a_window_as_long_as_the_sequence_changes_nothing_and_a_shorter_one_does() -> None:
    cache = layout([(6, 1), (0, 7)], 4, 2, seed=1)
    batch = build_batch(cache.spans, 4, CPU)
    query = torch.randn(batch.size, 4, DIM, generator=torch.Generator().manual_seed(2))
    full = attend(query, cache.keys, cache.values, batch, None)
    assert torch.allclose(attend(query, cache.keys, cache.values, batch, 7), full, atol=1e-6)
    assert not torch.allclose(attend(query, cache.keys, cache.values, batch, 6)[0], full[0], atol=1e-3)


# -- the batch ---------------------------------------------------------------------------------------------------------


def two_spans() -> Batch:
    decode = Span([7], 9, 4, [5, 2, 9], 9)
    prefill = Span([1, 2, 3], 2, 8, [4, 3], 4)
    return build_batch([decode, prefill], 4, CPU)


def test_a_batch_says_where_each_token_stands_and_where_its_key_goes() -> None:
    batch = two_spans()
    assert batch.token_ids.tolist() == [7, 1, 2, 3]
    assert batch.positions.tolist() == [9, 2, 3, 4]
    assert batch.slots.tolist() == [9 * 4 + 1, 4 * 4 + 2, 4 * 4 + 3, 3 * 4]
    assert batch.size == 4


def test_a_batch_knows_which_rows_need_logits() -> None:
    assert two_spans().logits_rows.tolist() == [0, 3]


def test_a_rows_rope_length_is_the_prompts_or_its_own_if_that_is_longer() -> None:
    assert two_spans().rope_lengths.tolist() == [10, 8, 8, 8]


def test_what_is_past_a_sequences_end_is_read_from_block_0() -> None:
    batch = build_batch([Span([1], 0, 1, [1], 0), Span([2], 5, 3, [2, 3], 5), Span([1, 2], 0, 2, [4], 1)], 4, CPU)
    assert [(c.row, c.count, c.start, c.length) for c in batch.contexts] == [
        (0, 1, 0, 64),
        (1, 1, 5, 64),
        (2, 2, 0, 64),
    ]
    assert batch.contexts[0].slots.tolist() == [4, *[0] * 63]
    assert batch.contexts[1].slots.tolist() == [8, 9, 10, 11, 12, 13, *[0] * 58]
