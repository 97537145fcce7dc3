"""What a worker decides to make of its experts, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from services.expert.options import choose_widening, widened_bytes
from shared.checkpoint import Checkpoint
from shared.errors import StartError
from shared.experts import ExpertBank, ExpertOptions
from shared.kernels.choice import choose_compilation
from tests.oracle import make_checkpoint

CPU = torch.device("cpu")
WEIGHTS: dict[str, Any] = {"weights": torch.bfloat16, "device": CPU, "native": False}
COMPILABLE = {**WEIGHTS, "avx512": True, "compiler": "/usr/bin/c++"}
AMPLE = {**WEIGHTS, "compiled": False, "needed": 50, "available": 100}


@pytest.mark.parametrize(
    ("setting", "changes", "widen", "reason"),
    [
        ("auto", {}, True, "memory is ample"),
        ("auto", {"needed": 51}, False, "more than half"),
        ("auto", {"native": True}, False, "itself"),
        ("auto", {"weights": torch.float32}, False, "nothing to widen: float32"),
        ("auto", {"compiled": True}, False, "as it reads"),
        ("on", {"native": True, "needed": 51}, True, "WIDEN_WEIGHTS=on"),
        ("on", {"device": torch.device("cuda")}, False, "nothing to widen: bfloat16 on cuda"),
        ("off", {}, False, "WIDEN_WEIGHTS=off"),
    ],
)
def test_widening_and_its_reason(
    setting: Literal["auto", "on", "off"], changes: dict[str, Any], reason: str, *, widen: bool
) -> None:
    decision = choose_widening(setting, **{**AMPLE, **changes})
    assert decision.yes is widen
    assert reason in decision.reason


@pytest.mark.parametrize(
    ("setting", "changes", "compile_it", "reason"),
    [
        (None, {}, True, "/usr/bin/c++ is there"),
        (None, {"compiler": None}, False, "no C++ compiler"),
        (None, {"native": True}, False, "itself"),
        (None, {"avx512": False}, False, "without AVX-512"),
        (None, {"native": True, "weights": torch.int8}, True, "is there"),
        (None, {"weights": torch.float16}, False, "not for float16 on cpu"),
        (None, {"device": torch.device("cuda")}, False, "not for bfloat16 on cuda"),
        (False, {}, False, "ENABLE_COMPILATION=false"),
        (True, {"native": True, "compiler": None}, True, "ENABLE_COMPILATION=true"),
    ],
)
def test_compilation_and_its_reason(
    changes: dict[str, Any], reason: str, *, setting: bool | None, compile_it: bool
) -> None:
    decision = choose_compilation(setting, **{**COMPILABLE, **changes})
    assert decision.yes is compile_it
    assert reason in decision.reason


def test_what_cannot_be_compiled_is_refused_when_asked_for() -> None:
    with pytest.raises(StartError, match="float16"):
        choose_compilation(True, **{**COMPILABLE, "weights": torch.float16})


@pytest.mark.parametrize(("workers", "shards", "replicas"), [(1, 1, 1), (2, 2, 1), (1, 4, 1), (4, 2, 2), (5, 2, 3)])
def test_every_replica_counts(workers: int, shards: int, replicas: int, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "m", "mixtral", dtype=torch.bfloat16))
    once = widened_bytes(checkpoint.config, workers=1, shards=1)
    bank = ExpertBank(checkpoint, dtype=torch.bfloat16, device=CPU, options=ExpertOptions(widen=True))
    assert once == bank.bytes_of(range(checkpoint.config.num_experts))
    assert widened_bytes(checkpoint.config, workers=workers, shards=shards) == replicas * once
