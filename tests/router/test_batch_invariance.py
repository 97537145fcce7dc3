"""A token's result does not depend on the other tokens of its step: alone, crowded, chunked, preempted."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
import torch

from services.router.messages import GenerateRequest, Sampling
from shared.linear import Linear
from shared.tensors import from_wire
from tests.oracle import VOCAB, make_checkpoint
from tests.router.inprocess import Result, local_engine

LENGTHS = (1, 2, 3, 9, 16, 17, 30, 5, 11, 1, 23, 40, 55, 100)


def requests(name: str) -> list[GenerateRequest]:
    draw = random.Random(3)
    return [
        GenerateRequest(
            id=f"{name}-{number}",
            token_ids=[draw.randrange(2, VOCAB) for _ in range(length)],
            max_tokens=24,
            sampling=Sampling(seed=number, temperature=1.5),
            ignore_eos=True,
            return_logits=True,
        )
        for number, length in enumerate(LENGTHS)
    ]


def logits(result: Result) -> torch.Tensor:
    rows = [from_wire(c.logits, "logits", (None, VOCAB), ("float32",)) for c in result.chunks if c.logits]
    return torch.cat(rows)


@pytest.mark.parametrize("variant", ["mixtral", "qwen2", "olmoe"])
async def test_logits_in_a_crowd_are_those_alone_to_the_bit(variant: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "m", variant)
    async with local_engine(path, prefill_chunk_tokens=256) as engine:
        alone = [await engine.generate(request) for request in requests("alone")]
        crowd = await asyncio.gather(*(engine.generate(request) for request in requests("crowd")))
    async with local_engine(path, blocks=40, prefill_chunk_tokens=7) as engine:
        pressed = await asyncio.gather(*(engine.generate(request) for request in requests("pressed")))
        assert engine.scheduler.preemptions > 0
    async with local_engine(path, blocks=64, block_tokens=64, prefill_chunk_tokens=50) as engine:
        one_piece = await asyncio.gather(*(engine.generate(request) for request in requests("one-piece")))
    for one, many, few, whole in zip(alone, crowd, pressed, one_piece, strict=True):
        assert one.tokens == many.tokens == few.tokens == whole.tokens
        assert torch.equal(logits(one), logits(whole))
        assert torch.equal(logits(one), logits(many))
        assert torch.equal(logits(one), logits(few))


@pytest.mark.parametrize("widen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(32, 48), (24, 32), (256, 8), (256, 512), (1024, 768), (256, 1)], ids=str)
def test_a_row_of_a_linear_layer_is_the_same_among_any_number_of_rows(
    shape: tuple[int, int], dtype: torch.dtype, *, widen: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    linear = Linear(torch.randn(shape[1], shape[0], generator=generator).to(dtype), widen=widen)
    x = torch.randn(300, shape[0], generator=generator).to(dtype)
    rows = [linear(x[:count])[0] for count in (1, 2, 3, 5, 8, 15, 16, 17, 33, 64, 100, 256, 300)]
    assert all(torch.equal(row, rows[0]) for row in rows)
