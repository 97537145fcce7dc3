"""When bfloat16 experts are kept as float32, and how that is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from services.expert.widening import choose_widening, widened_bytes
from shared.checkpoint import Checkpoint
from shared.experts import ExpertBank, ExpertOptions
from tests.oracle import make_checkpoint

CPU = torch.device("cpu")
AMPLE: dict[str, Any] = {"dtype": torch.bfloat16, "device": CPU, "native": False, "needed": 50, "available": 100}


@pytest.mark.parametrize(
    ("setting", "changes", "widen", "reason"),
    [
        ("auto", {}, True, "memory is ample"),
        ("auto", {"needed": 51}, False, "more than half"),
        ("auto", {"native": True}, False, "itself"),
        ("auto", {"dtype": torch.float32}, False, "nothing to widen: float32"),
        ("on", {"native": True, "needed": 51}, True, "WIDEN_WEIGHTS=on"),
        ("on", {"device": torch.device("cuda")}, False, "nothing to widen: bfloat16 on cuda"),
        ("off", {}, False, "WIDEN_WEIGHTS=off"),
    ],
)
def test_the_decision_and_its_reason(
    setting: Literal["auto", "on", "off"], changes: dict[str, Any], reason: str, *, widen: bool
) -> None:
    decision = choose_widening(setting, **{**AMPLE, **changes})
    assert decision.widen is widen
    assert reason in decision.reason


@pytest.mark.parametrize(("workers", "shards", "replicas"), [(1, 1, 1), (2, 2, 1), (1, 4, 1), (4, 2, 2), (5, 2, 3)])
def test_every_replica_counts(workers: int, shards: int, replicas: int, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "m", "mixtral", dtype=torch.bfloat16))
    once = widened_bytes(checkpoint.config, workers=1, shards=1)
    bank = ExpertBank(checkpoint, dtype=torch.bfloat16, device=CPU, options=ExpertOptions(widen=True))
    assert once == bank.bytes_of(range(checkpoint.config.num_experts))
    assert widened_bytes(checkpoint.config, workers=workers, shards=shards) == replicas * once
