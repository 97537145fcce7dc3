"""The experts' compute of one worker, without the bus: `python -m bench.experts tiny mixtral olmoe [--folder DIR]`.

One worker's half of the experts (every second one), T tokens whose experts are drawn at random, all layers one after
another. Prints, per number of tokens and per option, the milliseconds of one layer and the GB/s at which the weights of
the experts that were drawn were read; beside it a plain loop of F.linear, and how fast this machine reads memory.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from bench.checkpoints import SHAPES, write
from shared.checkpoint import Checkpoint, ModelConfig
from shared.experts import ExpertBank, ExpertOptions

TOKENS = (1, 4, 16, 64, 256)
SECONDS = 0.5
"""Per figure; the best of as many runs as fit."""
READ_BYTES = 512_000_000
OPTIONS: dict[str, ExpertOptions] = {
    "packed": ExpertOptions(),
    "widened": ExpertOptions(widen=True),
    "compiled": ExpertOptions(compiled=True),
    "8bit": ExpertOptions(quantization="8bit"),
    "8bit compiled": ExpertOptions(quantization="8bit", compiled=True),
    "compiled, sparsity 0.25": ExpertOptions(compiled=True, sparsity=0.25),
}


@dataclass(frozen=True)
class Call:
    """What a worker gets for one layer."""

    hidden: torch.Tensor
    """[T, H]"""
    token_index: torch.Tensor
    """[P] int32"""
    expert_index: torch.Tensor
    """[P] int32, even ones only"""
    weights: torch.Tensor
    """[P] float32"""


def draw(config: ModelConfig, tokens: int, dtype: torch.dtype) -> Call:
    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.rand(tokens, config.num_experts, generator=generator).topk(config.num_experts_per_tok).indices
    token_index = torch.arange(tokens).repeat_interleave(config.num_experts_per_tok)
    ours = chosen.flatten() % 2 == 0
    hidden = torch.randn(tokens, config.hidden_size, generator=generator).to(dtype)
    experts = chosen.flatten()[ours].int()
    return Call(hidden, token_index[ours].int(), experts, torch.rand(len(experts), generator=generator))


def milliseconds(run: Callable[[], object]) -> float:
    run()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best * 1e3


def memory_speed() -> float:
    """GB/s of adding up numbers that no cache holds."""
    numbers = torch.ones(READ_BYTES // 4)
    return READ_BYTES / 1e6 / milliseconds(numbers.sum)


def line(name: str, tokens: int, call: Call, config: ModelConfig, itemsize: float, ms: float) -> None:
    drawn = len(set(call.expert_index.tolist()))
    read = 3 * config.hidden_size * config.moe_intermediate_size * itemsize * drawn
    what = f"{name:24} {tokens:4} tokens {len(call.weights):5} pairs {drawn:3} experts"
    print(f"{what} {ms:9.3f} ms {read / ms / 1e6:6.1f} GB/s", flush=True)


def plain_layer(weights: list[tuple[torch.Tensor, torch.Tensor]], call: Call) -> torch.Tensor:
    """One layer with F.linear alone: `weights` has gate_up [2I, H] and down [H, I] of every second expert."""
    out = torch.zeros(call.hidden.shape)
    for expert in sorted(set(call.expert_index.tolist())):
        pairs = (call.expert_index == expert).nonzero().squeeze(1)
        rows = call.token_index[pairs]
        gate_up, down = weights[expert // 2]
        gate, up = F.linear(call.hidden[rows], gate_up).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, down)
        out.index_add_(0, rows, y.float() * call.weights[pairs].unsqueeze(1))
    return out


def _measure_plain(config: ModelConfig, calls: dict[int, Call]) -> None:
    hidden, inner, layers = config.hidden_size, config.moe_intermediate_size, len(config.moe_layers)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16)

    experts = range(0, config.num_experts, 2)
    weights = [[(random(2 * inner, hidden), random(hidden, inner)) for _ in experts] for _ in range(layers)]

    def run(call: Call) -> None:
        for layer in weights:
            plain_layer(layer, call)

    for tokens, call in calls.items():
        line("F.linear", tokens, call, config, 2, milliseconds(functools.partial(run, call)) / layers)


def measure(name: str, folder: Path, chosen: list[str]) -> None:
    checkpoint = Checkpoint.open(write(name, folder))
    config = checkpoint.config
    layers, ours = config.moe_layers, range(0, config.num_experts, 2)
    calls = {tokens: draw(config, tokens, torch.bfloat16) for tokens in TOKENS}
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    print(f"\n{name}: hidden {hidden}, inner {inner}, {config.num_experts} experts, top-{config.num_experts_per_tok}")
    _measure_plain(config, calls)
    for option in chosen:
        bank = ExpertBank(checkpoint, dtype=torch.bfloat16, device=torch.device("cpu"), options=OPTIONS[option])
        bank.load(ours)
        itemsize = bank.bytes_of(ours) / (3 * hidden * inner * len(ours) * len(layers))
        for tokens, call in calls.items():
            run = functools.partial(_all_layers, bank, call)
            line(option, tokens, call, config, itemsize, milliseconds(run) / len(layers))
        del bank


def _all_layers(bank: ExpertBank, call: Call) -> None:
    for layer in bank.config.moe_layers:
        bank.compute(layer, call.hidden, call.token_index, call.expert_index, call.weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=sorted(SHAPES), metavar="NAME", help=", ".join(sorted(SHAPES)))
    parser.add_argument("--folder", type=Path, help="where the checkpoints are and stay (default: a temporary one)")
    parser.add_argument("--options", nargs="+", choices=sorted(OPTIONS), default=list(OPTIONS), metavar="OPTION")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    print(f"{arguments.threads} thread(s), memory is read at {memory_speed():.1f} GB/s")
    with tempfile.TemporaryDirectory(prefix="openmoe-bench-") as temporary:
        for name in arguments.names:
            measure(name, (arguments.folder or Path(temporary)) / name, arguments.options)


if __name__ == "__main__":
    main()
