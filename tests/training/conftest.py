"""A small corpus, and runs of seconds."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from training.plan import Plan, Shape

TINY = Shape(hidden_size=32, layers=2, heads=2, expert_size=16, experts=4, top_k=2, vocab_size=320)
WORDS = [
    "def",
    "return",
    "import",
    "class",
    "for",
    "in",
    "if",
    "else",
    "while",
    "lambda",
    "yield",
    "None",
    "self",
    "len",
]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty files of made-up code."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(60):
        draw = random.Random(number)
        lines = [" ".join(draw.choices(WORDS, k=8)) for _ in range(40)]
        (folder / f"file_{number}.py").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def plan(corpus: Path, tmp_path: Path) -> Plan:
    return Plan(
        out=tmp_path / "run",
        data=(corpus,),
        shape=TINY,
        steps=6,
        batch_size=4,
        sequence_length=32,
        warmup_steps=2,
        save_every=3,
        eval_every=100,
    )
