"""The engine against transformers, in one process: every family and switch, chunked prefill, preemption, cancelling."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
import torch

from services.router.messages import GenerateRequest, Sampling
from shared.tensors import from_wire
from tests.oracle import VARIANTS, VOCAB, Oracle, as_transformers_4, make_checkpoint
from tests.router.inprocess import local_engine

GREEDY = Sampling(temperature=0)


def prompt(seed: int, length: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(2, VOCAB) for _ in range(length)]


@pytest.mark.parametrize("variant", VARIANTS)
async def test_logits_and_tokens_equal_transformers(variant: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "m", variant)
    oracle = Oracle(path)
    long = 50  # for rope-dynamic more than the 48 positions from which it stretches
    expected = [oracle.greedy(prompt(n, length), 6) for n, length in enumerate((long, 7, 1))]
    async with local_engine(path) as engine:
        results = await asyncio.gather(
            *(
                engine.generate(
                    GenerateRequest(
                        id=str(n),
                        token_ids=prompt(n, length),
                        max_tokens=6,
                        sampling=GREEDY,
                        ignore_eos=True,
                        return_logits=True,
                        return_prompt_logits=True,
                    )
                )
                for n, length in enumerate((long, 7, 1))
            )
        )
    for result, want in zip(results, expected, strict=True):
        assert result.error is None
        assert result.tokens == want.tokens
        shape = (None, VOCAB)
        got = torch.cat([from_wire(c.logits, "logits", shape, ("float32",)) for c in result.chunks if c.logits])
        assert (got - want.logits).abs().max() <= 1e-4
        rows = [from_wire(c.prompt_logits, "p", shape, ("float32",)) for c in result.chunks if c.prompt_logits]
        assert (torch.cat(rows) - want.prompt_logits).abs().max() <= 1e-4


@pytest.mark.parametrize("variant", ["mixtral", "rope-yarn", "rope-llama3"])
async def test_transformers_4_configurations_mean_the_same(variant: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "m", variant)
    want = Oracle(path).greedy(prompt(3, 45), 6)
    as_transformers_4(path)
    async with local_engine(path) as engine:
        request = GenerateRequest(id="a", token_ids=prompt(3, 45), max_tokens=6, sampling=GREEDY, ignore_eos=True)
        assert (await engine.generate(request)).tokens == want.tokens


async def test_preempted_sequences_say_the_same(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "m", "olmoe")
    requests = [
        GenerateRequest(id=str(n), token_ids=prompt(n, 9), max_tokens=24, sampling=Sampling(seed=n), ignore_eos=True)
        for n in range(6)
    ]
    async with local_engine(path) as engine:
        calm = [(await engine.generate(r)).tokens for r in requests]
    async with local_engine(path, blocks=20) as engine:
        crowded = [r.tokens for r in await asyncio.gather(*(engine.generate(r) for r in requests))]
        assert engine.scheduler.preemptions > 0
    assert crowded == calm


async def test_a_cancelled_generation_frees_its_blocks_at_once(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "m", "mixtral")
    async with local_engine(path) as engine:
        result = engine.submit(GenerateRequest(id="a", token_ids=[5] * 10, max_tokens=200, ignore_eos=True))
        while len(result.tokens) < 3:
            await asyncio.sleep(0)
        assert engine.engine.cancel("a")
        tokens = len(result.tokens)
        await result.done.wait()
        assert result.finish_reason == "cancelled"
        assert len(result.tokens) <= tokens + 1
        assert engine.scheduler.pool.usage == 0
        assert not engine.engine.cancel("a")


async def test_a_long_prompt_holds_up_no_short_one(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "m", "mixtral")
    async with local_engine(path, prefill_chunk_tokens=8) as engine:
        long = engine.submit(GenerateRequest(id="long", token_ids=[5] * 200, max_tokens=1))
        short = engine.submit(GenerateRequest(id="short", token_ids=[6] * 8, max_tokens=1))
        await short.done.wait()
        assert not long.done.is_set()
        await long.done.wait()


async def test_prompt_logprobs_and_logprobs_are_those_of_the_model(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "m", "qwen3")
    tokens = prompt(1, 21)
    want = Oracle(path).greedy(tokens, 3)
    async with local_engine(path) as engine:
        request = GenerateRequest(
            id="a", token_ids=tokens, max_tokens=3, sampling=GREEDY, ignore_eos=True, logprobs=2, prompt_logprobs=1
        )
        result = await engine.generate(request)
    scores = torch.log_softmax(want.prompt_logits, dim=-1)
    said = [p for c in result.chunks for p in (c.prompt_logprobs or [])]
    assert said[0] is None
    assert len(said) == len(tokens)
    for position, value in enumerate(said[1:], start=1):
        assert value is not None
        assert value.token == tokens[position]
        assert value.logprob == pytest.approx(float(scores[position - 1, tokens[position]]), abs=1e-4)
        assert value.top[0][0] == int(scores[position - 1].argmax())
    chosen = [p for c in result.chunks for p in c.logprobs]
    assert [p.token for p in chosen] == want.tokens
    assert all(p.rank == 1 and len(p.top) == 2 for p in chosen)


async def test_routing_names_the_experts_of_every_token(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "m", "qwen2-mlp-only")
    async with local_engine(path) as engine:
        request = GenerateRequest(id="a", token_ids=prompt(2, 30), max_tokens=0, return_routing=True)
        result = await engine.generate(request)
    rows = [from_wire(c.routing, "routing", (None, 2, 2), ("int32",)) for c in result.chunks if c.routing]
    routing = torch.cat(rows)
    assert routing.shape == (30, 2, 2)
    assert int(routing.min()) >= 0
    assert int(routing.max()) < 6


async def test_an_expired_request_never_runs(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "m", "mixtral")
    async with local_engine(path, batch_size=1) as engine:
        first = engine.submit(GenerateRequest(id="a", token_ids=[5] * 10, max_tokens=40, ignore_eos=True))
        late = engine.submit(GenerateRequest(id="b", token_ids=[5] * 10, max_tokens=4), deadline=0.0)
        await late.done.wait()
        assert late.error is not None
        assert late.error.code == "queue_timeout"
        await first.done.wait()
