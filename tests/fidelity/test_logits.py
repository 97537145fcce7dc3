"""Logits and greedy tokens equal those of transformers, over real processes, for every family, switch and sharding."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from services.router.messages import GenerateRequest, Sampling
from tests.fidelity.client import Answer, generate
from tests.fidelity.cluster import start_cluster
from tests.oracle import VARIANTS, VOCAB, Expected, Oracle, make_checkpoint
from tests.running import Watcher

SHARDS = (1, 2, 4)
DEFAULTS = ("mixtral", "olmoe", "qwen2", "qwen3")
NEW_TOKENS = 33
"""The first comes from the prefill, 32 from decode steps."""
TOLERANCE = 1e-4
ALONE = 24
LENGTHS = (1, 60, 2, 33, 3, 55, 4, 40, 5, 31, 8, 17, 13, 16, 21, 7)


# Elsewhere a gate's choice would hang on less than float rounding: the 2nd and 3rd best expert are equally good.
SALT = {"rope-llama3": 200}


def prompt(length: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(2, VOCAB) for _ in range(length)]


@torch.no_grad()
def greedy_together(oracle: Oracle, batch: list[list[int]]) -> list[Expected]:
    """Greedy continuations of all prompts at once, without a cache.

    Padding on the right is never attended to, because attention is causal.
    """
    tokens = torch.zeros(len(batch), max(map(len, batch)) + NEW_TOKENS, dtype=torch.int64)  # [B, T]
    for row, prompt in enumerate(batch):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    rows, last = torch.arange(len(batch)), torch.tensor([len(prompt) - 1 for prompt in batch])
    for step in range(NEW_TOKENS):
        tokens[rows, last + step + 1] = oracle.model(tokens, use_cache=False).logits[rows, last + step].argmax(dim=-1)
    logits = oracle.model(tokens, use_cache=False).logits.float()  # [B, T, V]
    return [
        Expected(own[:n], own[n - 1 : n - 1 + NEW_TOKENS], chosen[n : n + NEW_TOKENS].tolist())
        for own, chosen, n in zip(logits, tokens, map(len, batch), strict=True)
    ]


@dataclass(frozen=True)
class Case:
    """One variant: its checkpoint, its prompts, and what transformers says to them."""

    path: Path
    alone: list[int]
    batch: list[list[int]]
    expected_alone: Expected
    expected_batch: list[Expected]


@functools.cache
def make_case(variant: str, folder: Path) -> Case:
    path = make_checkpoint(folder / variant, variant)
    oracle = Oracle(path)
    most = oracle.model.config.max_position_embeddings - NEW_TOKENS
    seed = SALT.get(variant, 0)
    alone = prompt(ALONE, seed)  # with what is generated, beyond the positions from which rope-dynamic stretches
    batch = [prompt(n if n <= most else 1 + n % most, seed + number) for number, n in enumerate(LENGTHS)]
    return Case(path, alone, batch, oracle.greedy(alone, NEW_TOKENS), greedy_together(oracle, batch))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def ask(name: str, prompt: list[int]) -> GenerateRequest:
    return GenerateRequest(
        id=name,
        token_ids=prompt,
        max_tokens=NEW_TOKENS,
        sampling=Sampling(temperature=0),
        ignore_eos=True,
        return_logits=True,
        return_prompt_logits=True,
    )


def check(got: Answer, want: Expected) -> None:
    assert got.finish_reason == "length"
    assert got.prompt_logits.shape == want.prompt_logits.shape
    assert got.logits.shape == want.logits.shape
    assert (got.prompt_logits - want.prompt_logits).abs().max() <= TOLERANCE
    assert (got.logits - want.logits).abs().max() <= TOLERANCE
    assert got.tokens == want.tokens


def cases() -> Iterator[Any]:
    """Every variant with every number of shards; those beyond the families' defaults take turns in the short form."""
    for number, variant in enumerate(VARIANTS):
        for place, shards in enumerate(SHARDS):
            short = variant in DEFAULTS or number % len(SHARDS) == place
            yield pytest.param(variant, shards, id=f"{variant}-{shards}", marks=() if short else pytest.mark.slow)


@pytest.mark.parametrize(("variant", "shards"), [*cases()])
async def test_logits_over_the_bus_equal_transformers(
    variant: str, shards: int, checkpoints: Path, tmp_path: Path, nats_url: str, watcher: Watcher
) -> None:
    case = await asyncio.to_thread(make_case, variant, checkpoints)
    cluster = await start_cluster(tmp_path, case.path, nats_url, shards)
    try:
        await cluster.ready(watcher.fleet)
        check(await generate(watcher.bus, cluster.deployment, ask("alone", case.alone)), case.expected_alone)
        asked = [generate(watcher.bus, cluster.deployment, ask(f"batch-{n}", p)) for n, p in enumerate(case.batch)]
        for got, want in zip(await asyncio.gather(*asked), case.expected_batch, strict=True):
            check(got, want)
        await cluster.stop()
    finally:
        await cluster.kill()
