"""The block pool gives out each block once; the cache keeps to its budget."""

from __future__ import annotations

import random

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.compiled_model import CompiledKVCache, CompiledModel
from services.router.kv_cache import BlockPool, KVCache, num_blocks
from services.router.model import DenseModel
from shared.settings import MIB
from tests.router.configurations import configuration

CPU = torch.device("cpu")


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


def test_memory_that_was_never_needed_is_never_touched() -> None:
    pool = BlockPool(4096, 64)
    draw = random.Random(0)
    running: list[list[int]] = []
    most = 0
    for _ in range(2000):
        if len(running) == 16:
            pool.give_back(running.pop(draw.randrange(16)))
        running.append(pool.take(draw.randint(1, 12)) or [])
        most = max(most, 4096 - pool.free)
        assert max(map(max, running)) <= most


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_tokens_take_whole_blocks(tokens: int, blocks: int) -> None:
    assert BlockPool(8, 16).blocks_for(tokens) == blocks


@pytest.mark.parametrize(("head_dim", "block_tokens"), [(8, 64), (64, 128), (40, 64), (64, 1), (8, 100)])
@pytest.mark.parametrize("form", [DenseModel, CompiledModel])
def test_the_cache_keeps_to_its_budget_and_uses_it(form: type[DenseModel], head_dim: int, block_tokens: int) -> None:
    if form is CompiledModel and block_tokens % 64:
        pytest.skip("blocks of the compiled form are whole tiles")
    config = configuration(head_dim=head_dim)
    size = form.block_bytes(config, block_tokens, torch.float32, CPU)
    blocks = num_blocks(4, size)
    cache: KVCache | CompiledKVCache
    if form is CompiledModel:
        cache = CompiledKVCache(config, blocks, block_tokens)
    else:
        cache = KVCache(config, blocks, block_tokens, torch.float32, CPU)
        slots = (blocks + 1) * block_tokens
        assert cache.keys[0].shape == (slots, config.num_key_value_heads, config.head_dim)
    taken = sum(tensor.nbytes for tensor in [*cache.keys, *cache.values])
    assert taken <= 4 * MIB < taken + size
    assert len(cache.keys) == len(cache.values) == config.num_hidden_layers


def test_the_padding_block_is_zero() -> None:
    cache = KVCache(configuration(), 2, 4, torch.float32, torch.device("cpu"))
    assert not any(tensor[:4].any() for tensor in [*cache.keys, *cache.values])


def test_a_budget_below_one_block_holds_none() -> None:
    assert num_blocks(1, DenseModel.block_bytes(configuration(), 4096, torch.float32, CPU)) == 0


def test_what_is_not_used_yet_takes_no_memory() -> None:
    config = configuration()
    blocks = num_blocks(256, 2 * config.num_hidden_layers * 16 * config.num_key_value_heads * config.head_dim * 2)
    before = psutil.Process().memory_info().rss
    cache = KVCache(config, blocks, 16, torch.bfloat16, torch.device("cpu"))
    assert sum(t.nbytes for t in [*cache.keys, *cache.values]) > 250 * MIB
    assert psutil.Process().memory_info().rss - before < 32 * MIB
    assert not cache.keys[0][-16:].any()
