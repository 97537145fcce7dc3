"""What a training run is: everything that its result depends on, in one frozen value."""

from __future__ import annotations

import dataclasses
import math
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import StartError

# What may differ between a run and its continuation: it changes what is reported and kept, not what is learned.
FREE_TO_CHANGE = frozenset({"out", "save_every", "keep", "eval_every"})


@dataclass(frozen=True)
class Shape:
    """The model's size: OLMoE's architecture (arXiv 2409.02060). One expert with top-1 is a dense model."""

    hidden_size: int = 256
    layers: int = 4
    heads: int = 8
    expert_size: int = 128
    """Inner size of one expert."""
    experts: int = 8
    top_k: int = 2
    vocab_size: int = 4096
    max_position_embeddings: int = 1024

    def dense(self) -> Shape:
        """The dense twin: as many active parameters per token, but for the gates."""
        return dataclasses.replace(self, experts=1, top_k=1, expert_size=self.expert_size * self.top_k)

    def check(self) -> None:
        """Refuse sizes that make no model.

        Raises:
            StartError: naming the option.

        """
        if self.hidden_size % self.heads:
            raise StartError(f"--hidden-size {self.hidden_size} is no multiple of --heads {self.heads}")
        if self.top_k > self.experts:
            raise StartError(f"--top-k {self.top_k} is more than --experts {self.experts}")


@dataclass(frozen=True)
class Plan:
    """One run. The same plan gives the same model, whether or not the run was interrupted."""

    out: Path
    data: tuple[Path, ...] = ()
    """Folders and files of text; none: the Python standard library's sources."""
    pattern: str = "*.py"
    init: Path | None = None
    """A checkpoint to fine-tune; None: a fresh model of `shape`."""
    shape: Shape = Shape()
    steps: int = 1600
    batch_size: int = 16
    """Sequences per step, over all processes."""
    sequence_length: int = 256
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    balance_coefficient: float = 0.01
    z_coefficient: float = 0.001
    seed: int = 1
    save_every: int = 100
    keep: int = 2
    eval_every: int = 200

    def sources(self) -> tuple[Path, ...]:
        return self.data or (Path(sysconfig.get_paths()["stdlib"]),)

    def fingerprint(self) -> dict[str, Any]:
        """What a continued run must share with the interrupted one, as JSON."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in FREE_TO_CHANGE}
        return {
            **values,
            "data": [str(path) for path in self.data],
            "init": None if self.init is None else str(self.init),
        }

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a tenth (arXiv 2203.15556)."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
