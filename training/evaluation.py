"""How good a model is on held-out text, and how evenly its experts are used."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table

from training.corpus import Tokens

BATCH = 16


@dataclass(frozen=True)
class LayerUse:
    """One MoE layer's experts over the held-out text."""

    layer: int
    tokens: list[int]
    """[E]"""
    entropy: float
    """Share of its maximum: 1 is even."""
    imbalance: float
    """The busiest expert's tokens over the mean: 1 is even."""


@dataclass(frozen=True)
class Evaluation:
    """Held-out figures."""

    perplexity: float
    """Per token."""
    bits_per_byte: float
    """Independent of the tokenizer."""
    top_1_accuracy: float
    tokens: int
    layers: list[LayerUse]

    def write(self, path: Path, **more: Any) -> None:
        path.write_text(json.dumps({**more, **asdict(self)}, indent=2) + "\n", encoding="utf-8")


def expert_use(counts: torch.Tensor) -> list[LayerUse]:
    """Entropy and imbalance of each row of `counts` [L, E]."""
    result = []
    for layer, row in enumerate(counts.double()):
        shares = row / row.sum().clamp(min=1)
        most = math.log(len(row)) or 1.0
        entropy = float(-(shares * shares.clamp(min=1e-12).log()).sum()) / most
        mean = float(row.mean()) or 1.0
        result.append(LayerUse(layer, [int(c) for c in row], entropy, float(row.max()) / mean))
    return result


@torch.no_grad()
def evaluate(
    model: Any, windows: Tokens, bytes_per_token: float, *, top_k: int, device: torch.device, most: int | None = None
) -> Evaluation:
    """Perplexity, bits per byte and expert use over `windows` [n, length + 1], or over the first `most` of them."""
    chosen = windows[:most]
    model.eval()
    loss, correct, tokens = 0.0, 0, 0
    counts: torch.Tensor | None = None
    for start in range(0, len(chosen), BATCH):
        rows = torch.from_numpy(chosen[start : start + BATCH].astype(np.int64)).to(device)
        out = model(input_ids=rows[:, :-1], output_router_logits=True, use_cache=False)
        logits, targets = out.logits.float().flatten(0, 1), rows[:, 1:].flatten()
        loss += float(F.cross_entropy(logits, targets, reduction="sum"))
        correct += int((logits.argmax(dim=-1) == targets).sum())
        tokens += targets.numel()
        gates = [g for g in out.router_logits if g is not None]
        used = torch.stack([torch.bincount(g.topk(top_k).indices.flatten(), minlength=g.shape[-1]) for g in gates])
        counts = used if counts is None else counts + used
    model.train()
    assert counts is not None  # noqa: S101 - read_texts() refuses a corpus without held-out text
    per_token = loss / tokens
    bits = per_token / math.log(2) / bytes_per_token
    return Evaluation(math.exp(per_token), bits, correct / tokens, tokens, expert_use(counts.cpu()))


def use_table(evaluation: Evaluation) -> Table:
    """The expert-utilisation report for the terminal."""
    table = Table("layer", "share of tokens per expert", "entropy", "max / mean", title="experts on held-out text")
    for use in evaluation.layers:
        total = sum(use.tokens) or 1
        shares = " ".join(f"{100 * count / total:4.1f}%" for count in use.tokens)
        table.add_row(str(use.layer), shares, f"{use.entropy:.3f}", f"{use.imbalance:.2f}")
    return table
