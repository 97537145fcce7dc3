"""A token's result does not depend on the other tokens of its step: alone, crowded, chunked, preempted."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from services.router.messages import GenerateRequest, Sampling
from shared.kernels.build import find_compiler
from shared.linear import Linear
from shared.tensors import from_wire
from tests.oracle import VOCAB, make_checkpoint
from tests.router.inprocess import Result, local_engine

LENGTHS = (1, 2, 3, 9, 16, 17, 30, 5, 11, 1, 23, 40, 55, 100)


def requests(name: str, max_tokens: int = 24) -> list[GenerateRequest]:
    draw = random.Random(3)
    return [
        GenerateRequest(
            id=f"{name}-{number}",
            token_ids=[draw.randrange(2, VOCAB) for _ in range(length)],
            max_tokens=max_tokens,
            sampling=Sampling(seed=number, temperature=1.5),
            ignore_eos=True,
            return_logits=True,
        )
        for number, length in enumerate(LENGTHS)
    ]


def logits(result: Result) -> torch.Tensor:
    rows = [from_wire(c.logits, "logits", (None, VOCAB), ("float32",)) for c in result.chunks if c.logits]
    return torch.cat(rows)


FORMS: dict[str, dict[str, Any]] = {
    "torch": {"block_tokens": 4, "blocks": 256},
    "compiled": {"block_tokens": 64, "blocks": 32, "compiled": True},
}
PRESSED = {"torch": {**FORMS["torch"], "blocks": 40}, "compiled": {**FORMS["compiled"], "blocks": 7}}
with_compiler = pytest.mark.skipif(find_compiler() is None, reason="needs g++ or clang++")


@pytest.mark.parametrize("form", ["torch", pytest.param("compiled", marks=with_compiler)])
@pytest.mark.parametrize("variant", ["mixtral", "qwen2", "olmoe", "qwen3-sliding"])
async def test_logits_in_a_crowd_are_those_alone_to_the_bit(variant: str, form: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "m", variant)
    new = 16 + 2 * FORMS[form]["block_tokens"]
    async with local_engine(path, prefill_chunk_tokens=256, **FORMS[form]) as engine:
        alone = [await engine.generate(request) for request in requests("alone", new)]
        crowd = await asyncio.gather(*(engine.generate(request) for request in requests("crowd", new)))
    async with local_engine(path, prefill_chunk_tokens=7, **PRESSED[form]) as engine:
        pressed = await asyncio.gather(*(engine.generate(request) for request in requests("pressed", new)))
        assert engine.scheduler.preemptions > 0
    for one, many, few in zip(alone, crowd, pressed, strict=True):
        assert one.tokens == many.tokens == few.tokens
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
