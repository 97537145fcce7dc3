"""The dense part by our kernel says what it says by torch, for every family and switch, and for sizes that fill no tile."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

import shared.compute
from services.router.batch import Span, build_batch
from services.router.compiled_model import CompiledModel
from services.router.messages import GenerateRequest, Sampling
from services.router.model import DenseModel, Routing
from services.router.options import choose_model
from shared.checkpoint import Checkpoint
from shared.kernels.build import find_compiler
from shared.kernels.dense import CompiledMatrix
from shared.settings import RouterSettings
from shared.tensors import TORCH_DTYPE
from tests.oracle import VARIANTS, VOCAB, make_checkpoint
from tests.router.configurations import configuration
from tests.router.inprocess import Result, local_engine
from tests.router.test_batch_invariance import logits

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="needs g++ or clang++")
CPU = torch.device("cpu")
LENGTHS = (1, 2, 7, 63, 64, 65, 128, 180)


def requests(longest: int) -> list[GenerateRequest]:
    draw = random.Random(3)
    return [
        GenerateRequest(
            id=str(number),
            token_ids=[draw.randrange(2, VOCAB) for _ in range(min(length, longest - 12))],
            max_tokens=12,
            sampling=Sampling(seed=number, temperature=1.0),
            ignore_eos=True,
            return_logits=True,
            return_prompt_logits=True,
        )
        for number, length in enumerate(LENGTHS)
    ]


async def answers(path: Path, **form: Any) -> list[Result]:
    longest = Checkpoint.open(path).config.context_length
    async with local_engine(path, blocks=64, block_tokens=64, prefill_chunk_tokens=150, **form) as engine:
        return list(await asyncio.gather(*(engine.generate(request) for request in requests(longest))))


@pytest.mark.parametrize("variant", sorted(VARIANTS))
async def test_generations_are_those_of_torch(variant: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "m", variant)
    for want, got in zip(await answers(path), await answers(path, compiled=True), strict=True):
        assert got.tokens == want.tokens
        torch.testing.assert_close(logits(got), logits(want), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("variant", ["olmoe", "mixtral-sliding-window", "qwen3"])
def test_threads_and_neighbours_change_no_bit(
    variant: str, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"hidden_size": 256, "num_attention_heads": 8, "head_dim": 80} if variant == "qwen3" else {}
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "m", variant, dtype=torch.bfloat16, **more))
    monkeypatch.setattr(shared.compute, "_most_threads", threads)
    model = CompiledModel.load(checkpoint, torch.bfloat16, CPU, lambda _: None)
    model.allocate_cache(16, 128)
    tokens = [i * 7 % VOCAB for i in range(200)]

    def last_row(*spans: Span) -> tuple[torch.Tensor, Routing]:
        batch = build_batch(list(spans), 128, CPU)
        step = model.begin(batch)
        hidden = step.attention(0, step.hidden)
        return hidden[-1].clone(), model.route(0, hidden)

    whole, routing = last_row(Span(tokens, 0, 200, [3, 1], 199))
    for start in range(0, 199, 37):
        last_row(Span([5], start, 1, [4, 5], start), Span(tokens[start : start + 37], start, 200, [9, 2], start))
    one, alone = last_row(Span(tokens[199:], 199, 200, [9, 2], 199))
    assert torch.equal(one, whole)
    assert torch.equal(alone.hidden[0], routing.hidden[-1])
    assert torch.equal(alone.top_k_index[0], routing.top_k_index[-1])
    assert torch.equal(alone.top_k_weights[0], routing.top_k_weights[-1])


def test_the_gate_by_itself_chooses_as_it_does_in_a_step(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "m", "olmoe", dtype=torch.bfloat16))
    model = CompiledModel.load(checkpoint, torch.bfloat16, CPU, lambda _: None)
    routed = model.route(1, torch.randn(9, checkpoint.config.hidden_size, generator=torch.Generator().manual_seed(1)))
    gated = model.gate(1, routed.hidden)
    assert torch.equal(gated.top_k_index, routed.top_k_index)
    assert torch.equal(gated.top_k_weights, routed.top_k_weights)


@pytest.mark.parametrize("variant", ["olmoe", "mixtral", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gate_chooses_as_torch_does(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "m", variant, dtype=dtype))
    assert TORCH_DTYPE[checkpoint.config.dtype] is dtype
    torch_model = DenseModel.load(checkpoint, dtype, CPU, lambda _: None)
    model = CompiledModel.load(checkpoint, dtype, CPU, lambda _: None)
    normed = torch.randn(200, checkpoint.config.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)
    want, got = torch_model.gate(0, normed), model.gate(0, normed)
    same = (want.top_k_index == got.top_k_index).all(dim=1)
    # In bfloat16 torch rounds the gate's logits, so that some are equal.
    assert same.all() if dtype is torch.float32 else same.float().mean() > 0.9
    tolerance = 1e-6 if dtype is torch.float32 else 0.01
    torch.testing.assert_close(got.top_k_weights[same], want.top_k_weights[same], rtol=tolerance, atol=tolerance)


def test_a_gate_of_no_numbers_still_names_experts_that_are_there(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "m", "mixtral"))
    model = CompiledModel.load(checkpoint, torch.float32, CPU, lambda _: None)
    routing = model.route(0, torch.full((3, checkpoint.config.hidden_size), torch.nan))
    assert routing.top_k_index.min() >= 0
    assert routing.top_k_index.max() < checkpoint.config.num_experts
    assert all(len(set(row)) == len(row) for row in routing.top_k_index.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 63), (64, 64), (100, 65), (33, 200), (300, 500)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_products_are_those_of_float64(
    shape: tuple[int, int], dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch, *, biased: bool
) -> None:
    monkeypatch.setattr(shared.compute, "_most_threads", threads)
    generator = torch.Generator().manual_seed(2)
    inputs, outputs = shape
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype) if biased else None
    x = torch.randn(110, inputs, generator=generator)
    want = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    matrix = CompiledMatrix(weight, bias)
    got = matrix(x)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-5)
    for rows in (1, 2, 5, 6, 7, 97):
        assert torch.equal(matrix(x[:rows]), got[:rows])


def test_calls_at_the_same_time_disturb_each_other_in_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared.compute, "_most_threads", 2)
    generator = torch.Generator().manual_seed(2)
    matrix = CompiledMatrix(torch.randn(512, 256, generator=generator))
    xs = [torch.randn(rows, 256, generator=generator) for rows in (100, 64, 1, 90)]
    alone = [matrix(x) for x in xs]
    with ThreadPoolExecutor(len(xs)) as pool:
        for _ in range(30):
            for want, got in zip(alone, pool.map(matrix, xs), strict=True):
                assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("changes", "config", "dtype", "reason"),
    [
        ({}, {}, torch.bfloat16, None),
        ({}, {}, torch.float16, "float16"),
        ({"kv_block_tokens": 16}, {}, torch.float32, "KV_BLOCK_TOKENS=16"),
        ({"kv_block_tokens": 192}, {}, torch.float32, None),
        ({}, {"head_dim": 520}, torch.float32, "heads of 520"),
        ({"enable_compilation": False}, {}, torch.float32, "ENABLE_COMPILATION=false"),
    ],
)
def test_which_form_a_router_runs_and_why(
    changes: dict[str, Any], config: dict[str, Any], dtype: torch.dtype, reason: str | None
) -> None:
    settings = RouterSettings(model=Path("any"), **{"enable_compilation": True, **changes})
    with capture_logs() as logs:
        chosen = choose_model(settings, configuration(**config), dtype, CPU)
    assert chosen is (CompiledModel if reason is None else DenseModel)
    assert reason is None or reason in logs[0]["reason"]
