"""What the experts' options cost in quality.

python -m bench.quality [--model models/demo] [--quantization 8bit] [--sparsity 0.1,0.25,0.5]

Perplexity and next-token accuracy on held-out text (the demo model's: 1 in 20 files of Python's own library, see
docs/demo-model.md), and how often the most likely token is that of the checkpoint as it is. Transformers runs the
model; only its experts are ours, with each option as a worker would have them.
"""

from __future__ import annotations

import argparse
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from shared.checkpoint import Checkpoint
from shared.experts import ExpertBank, ExpertOptions
from shared.kernels.build import find_compiler
from shared.pruning import kept_channels
from shared.tensors import TORCH_DTYPE
from training.corpus import Tokens, encode, held_out_windows, read_texts
from training.plan import Plan

LENGTH = 256
BATCH = 16


@dataclass(frozen=True)
class Quality:
    """One model's figures over the held-out text."""

    perplexity: float
    accuracy: float
    """Share of tokens whose most likely prediction came true."""
    best: torch.Tensor
    """[N]: the most likely token at each position."""


@torch.no_grad()
def evaluate(model: Any, windows: Tokens) -> Quality:
    loss, correct, best = 0.0, 0, []
    for start in range(0, len(windows), BATCH):
        rows = torch.from_numpy(windows[start : start + BATCH].astype(np.int64))
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float().flatten(0, 1)  # [n, V]
        targets = rows[:, 1:].flatten()
        loss += float(F.cross_entropy(logits, targets, reduction="sum"))
        best.append(logits.argmax(dim=-1))
        correct += int((best[-1] == targets).sum())
    tokens = windows.shape[0] * LENGTH
    return Quality(math.exp(loss / tokens), correct / tokens, torch.cat(best))


def experts_of(bank: ExpertBank, layer: int) -> Any:
    """A forward for transformers' experts module: hidden [T, H], top_k_index [T, k], top_k_weights [T, k] -> [T, H]."""

    def forward(hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        tokens, k = top_k_index.shape
        token_index = torch.arange(tokens).repeat_interleave(k)
        return bank.compute(layer, hidden, token_index, top_k_index.flatten(), top_k_weights.flatten().float())

    return forward


def with_options(path: Path, options: ExpertOptions) -> tuple[Any, int]:
    """The model as transformers runs it, with our experts, and the bytes that these take."""
    checkpoint = Checkpoint.open(path)
    dtype = TORCH_DTYPE[checkpoint.config.dtype]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    bank = ExpertBank(checkpoint, dtype=dtype, device=torch.device("cpu"), options=options)
    everyone = range(checkpoint.config.num_experts)
    bank.load(everyone)
    for layer in checkpoint.config.moe_layers:
        model.model.layers[layer].mlp.experts.forward = experts_of(bank, layer)
    return model, bank.bytes_of(everyone)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/demo"))
    parser.add_argument(
        "--data", type=Path, nargs="*", default=[], help="held-out text (default: as for the demo model)"
    )
    parser.add_argument(
        "--quantization", choices=["none", "8bit"], default="8bit", help="shown alone and with sparsity"
    )
    parser.add_argument("--sparsity", default="0.1,0.25,0.5", help="ratios, with commas between")
    parser.add_argument("--windows", type=int, default=100, help=f"of {LENGTH} tokens; evenly spread over the text")
    arguments = parser.parse_args()
    disable_progress_bar()
    plan = Plan(Path(), data=tuple(arguments.data))
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    windows = held_out_windows(encode(tokenizer, read_texts(plan.sources(), plan.pattern).held_out), LENGTH)
    windows = windows[np.linspace(0, len(windows) - 1, min(arguments.windows, len(windows))).astype(int)]
    compiled = functools.partial(ExpertOptions, compiled=find_compiler() is not None)
    ratios = [float(text) for text in arguments.sparsity.split(",") if text]
    rows = [("as it is", compiled()), ("widened", ExpertOptions(widen=True))]
    rows += [(f"sparsity {ratio:g}", compiled(sparsity=ratio)) for ratio in ratios]
    if arguments.quantization != "none":
        quantized = functools.partial(compiled, quantization=arguments.quantization)
        rows.append((arguments.quantization, quantized()))
        rows += [(f"{arguments.quantization}, sparsity {ratio:g}", quantized(sparsity=ratio)) for ratio in ratios]
    reference = evaluate(AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto").eval(), windows)
    print(f"{windows.shape[0]} windows of {LENGTH} held-out tokens\n")
    print("| experts | channels | MB | perplexity | next token right | same choice as transformers |")
    print("|---|---|---|---|---|---|")
    print(f"| transformers | | | {reference.perplexity:.3f} | {reference.accuracy:.2%} | |")
    inner = Checkpoint.open(arguments.model).config.moe_intermediate_size
    for name, options in rows:
        model, size = with_options(arguments.model, options)
        got = evaluate(model, windows)
        same = float((got.best == reference.best).float().mean())
        memory = f"{kept_channels(inner, options.sparsity)} | {size / 1e6:.2f}"
        print(f"| {name} | {memory} | {got.perplexity:.3f} | {got.accuracy:.2%} | {same:.2%} |", flush=True)


if __name__ == "__main__":
    main()
