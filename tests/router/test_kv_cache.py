"""The block pool gives out each block once; the cache keeps to its budget."""

from __future__ import annotations

import random

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.kv_cache import BlockPool, KVCache, block_bytes, num_blocks
from shared.settings import MIB
from tests.router.configurations import configuration


@settings(deadline=None)
@given(blocks=st.integers(0, 30), wishes=st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=40))
def test_a_block_has_one_owner_and_none_is_lost(blocks: int, wishes: list[tuple[bool, int]]) -> None:
    pool = BlockPool(blocks, 16)
    owned: list[list[int]] = []
    for take, number in wishes:
        if take:
            free = pool.free
            given_out = pool.take(number)
            if given_out is None:
                assert number > free == pool.free, "refused although there were enough, or some were lost by refusing"
            else:
                assert len(given_out) == number
                owned.append(given_out)
        elif owned:
            pool.give_back(owned.pop(number % len(owned)))
        held = [block for some in owned for block in some]
        assert len(held) == len(set(held))
        assert set(held) <= set(range(1, blocks + 1)), "block 0 is nobody's"
        assert pool.free + len(held) == blocks
        if blocks:
            assert pool.usage == pytest.approx(len(held) / blocks)
    for some in owned:
        pool.give_back(some)
    assert sorted(pool.take(blocks) or []) == list(range(1, blocks + 1))


def test_sequences_that_grow_in_turns_stay_in_one_piece_while_there_is_room() -> None:
    pool = BlockPool(512, 64)
    sequences = [pool.take(2) or [] for _ in range(16)]
    for _ in range(12):
        for blocks in sequences:
            blocks.extend(pool.take(1, after=blocks[-1]) or [])
    for blocks in sequences:
        assert blocks == list(range(blocks[0], blocks[0] + 14))


def test_sequences_that_come_and_go_use_the_same_blocks_again() -> None:
    pool = BlockPool(4096, 64)
    draw = random.Random(0)
    running: list[list[int]] = []
    seen: set[int] = set()
    for _ in range(2000):
        if len(running) == 16:
            pool.give_back(running.pop(draw.randrange(16)))
        blocks = pool.take(draw.randint(1, 4)) or []
        for _ in range(draw.randint(0, 8)):
            blocks.extend(pool.take(1, after=blocks[-1]) or [])
        running.append(blocks)
        seen.update(blocks)
    assert len(seen) < 1024, "far more than 16 sequences of at most 12 blocks and their room"


def test_a_pool_in_pieces_still_gives_out_all_it_has() -> None:
    pool = BlockPool(9, 64)
    assert pool.take(9) is not None
    pool.give_back([2, 5, 8])
    assert sorted(pool.take(3, after=4) or []) == [2, 5, 8]
    assert pool.take(1) is None


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_tokens_take_whole_blocks(tokens: int, blocks: int) -> None:
    assert BlockPool(8, 16).blocks_for(tokens) == blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_tokens", [1, 16, 100])
def test_the_cache_keeps_to_its_budget_and_uses_it(dtype: torch.dtype, block_tokens: int) -> None:
    config = configuration()
    itemsize = torch.empty(0, dtype=dtype).element_size()
    blocks = num_blocks(config, 1, block_tokens, itemsize)
    cache = KVCache(config, blocks, block_tokens, dtype, torch.device("cpu"))
    size = sum(tensor.nbytes for tensor in [*cache.keys, *cache.values])
    assert size <= MIB < size + block_bytes(config, block_tokens, itemsize)
    assert len(cache.keys) == len(cache.values) == config.num_hidden_layers
    slots = (blocks + 1) * block_tokens
    assert cache.keys[0].shape == (slots, config.num_key_value_heads, config.head_dim)


def test_the_padding_block_is_zero() -> None:
    cache = KVCache(configuration(), 2, 4, torch.float32, torch.device("cpu"))
    assert not any(tensor[:4].any() for tensor in [*cache.keys, *cache.values])


def test_a_budget_below_one_block_holds_none() -> None:
    assert num_blocks(configuration(max_position_embeddings=4096), 1, 4096, 4) == 0


def test_what_is_not_used_yet_takes_no_memory() -> None:
    config = configuration()
    blocks = num_blocks(config, 256, 16, 2)
    before = psutil.Process().memory_info().rss
    cache = KVCache(config, blocks, 16, torch.bfloat16, torch.device("cpu"))
    assert sum(t.nbytes for t in [*cache.keys, *cache.values]) > 250 * MIB
    assert psutil.Process().memory_info().rss - before < 32 * MIB
    assert not cache.keys[0][-16:].any()
