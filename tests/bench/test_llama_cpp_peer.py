"""llama.cpp computes from our GGUF file what transformers computes from the checkpoint; else it is no peer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.peers import LLAMA_CPP, peer
from tests.oracle import VOCAB, Oracle, make_checkpoint

for package in ("gguf", "llama_cpp"):
    pytest.importorskip(
        package, reason=f"needs {package}: pip install 'openmoe[llama-cpp]', which compiles for minutes"
    )

from bench.gguf_checkpoint import write  # noqa: E402 - it imports gguf
from bench.llama_cpp_peer import Model  # noqa: E402 - it imports llama_cpp

VARIANTS = ("mixtral", "mixtral-tied", "mixtral-head-dim", "olmoe", "qwen3")
NEW_TOKENS = 12


@contextlib.contextmanager
def loaded(file: Path, **options: Any) -> Iterator[Model]:
    model = Model(file, 1, **options)
    try:
        yield model
    finally:
        model.close()


def prompts(streams: int, length: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(length)
    found: list[list[int]] = torch.randint(2, VOCAB, (streams, length), generator=draw).tolist()
    return found


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_tokens_are_those_of_transformers(variant: str, streams: int, tmp_path: Path) -> None:
    """In float32 throughout: logits to 5e-4 of the largest, and the very tokens."""
    path = make_checkpoint(tmp_path / variant, variant)
    oracle, asked = Oracle(path), prompts(streams, 19)
    with loaded(write(path, tmp_path / "model.gguf"), float32_cache=True) as model:
        steps = [(logits.copy(), tokens.copy()) for logits, tokens in model.steps(asked, NEW_TOKENS)]
    for number, prompt in enumerate(asked):
        expected = oracle.greedy(prompt, NEW_TOKENS)
        assert [int(tokens[number]) for _, tokens in steps] == expected.tokens
        got, wanted = np.stack([logits[number] for logits, _ in steps]), expected.logits.numpy()
        np.testing.assert_allclose(got, wanted, atol=5e-4 * float(np.abs(wanted).max()), rtol=0)


def test_a_model_is_asked_again_and_with_other_shapes(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "olmoe", "olmoe")
    one, two = prompts(1, 40), prompts(4, 9)
    with loaded(write(path, tmp_path / "model.gguf")) as model:
        first, others = model.generate(one, 8), model.generate(two, 5)
        assert model.generate(one, 8) == first
        assert model.generate(two, 5) == others
    assert [len(tokens) for tokens in first + others] == [8, 5, 5, 5, 5]


async def test_its_process_answers(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "qwen3", "qwen3", dtype=torch.bfloat16)
    file = write(path, tmp_path / "model.gguf")
    async with peer(LLAMA_CPP, [str(file), "1"]) as running:
        assert await running.run(prompts(2, 16), 4) > 0
        assert await running.run(prompts(1, 100), 1) > 0


async def test_a_process_that_cannot_load_says_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.gguf").write_bytes(b"no model")
    with pytest.raises(SystemExit, match=r"llama\.cpp's process ended"):
        async with peer(LLAMA_CPP, [str(tmp_path / "model.gguf"), "1"]):
            pass
    assert "magic" in capfd.readouterr().err
