"""Resident memory of one expert worker that holds half of a model's experts, against its bound.

Usage: python bench/worker_memory.py [--gigabytes 1.0] [--folder DIR]. Exit code 1 if the worker takes more than 60 % of
the whole model's expert bytes plus 400 MB, at its peak or after; WIDEN_WEIGHTS is off. Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from services.nats_server import binary, free_port, write_config
from shared.bus import Bus
from shared.status import Fleet

LAYERS, EXPERTS, HIDDEN, VOCAB = 8, 8, 1024, 1024
ITEMSIZE = 2
SHARE_OF_EXPERTS = 0.6
CONSTANT_BYTES = 400_000_000
READY_SECONDS = 300
INSTANCE = "memory"
MB = 1_000_000


@dataclass(frozen=True)
class Memory:
    """One worker's memory, in bytes, and what it may take."""

    expert_bytes: int
    """Of the whole model; the worker holds half of them."""
    steady: int
    peak: int

    @property
    def bound(self) -> int:
        return int(SHARE_OF_EXPERTS * self.expert_bytes) + CONSTANT_BYTES

    @property
    def ok(self) -> bool:
        return max(self.steady, self.peak) <= self.bound

    def __str__(self) -> str:
        parts = (
            f"experts {self.expert_bytes / MB:.0f} MB, half of them in one worker",
            f"steady {self.steady / MB:.0f} MB, peak {self.peak / MB:.0f} MB, bound {self.bound / MB:.0f} MB",
            "ok" if self.ok else "OVER THE BOUND",
        )
        return "; ".join(parts)


def write_checkpoint(path: Path, gigabytes: float) -> int:
    """Write a random bf16 Mixtral with about so many GB of experts, a file per layer; returns the experts' bytes."""
    inner = round(gigabytes * 1e9 / (LAYERS * EXPERTS * 3 * HIDDEN * ITEMSIZE) / 64) * 64
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": inner,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 2048,
        "dtype": "bfloat16",
    }
    (path / "config.json").write_text(json.dumps(config))
    weight_map: dict[str, str] = {}

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, path / name)
        weight_map.update(dict.fromkeys(tensors, name))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16)

    square, vector = random(HIDDEN, HIDDEN), torch.ones(HIDDEN, dtype=torch.bfloat16)
    up, down = random(inner, HIDDEN), random(HIDDEN, inner)
    dense = {"embed_tokens.weight": random(VOCAB, HIDDEN), "norm.weight": vector.clone()}
    write("dense.safetensors", {f"model.{n}": t for n, t in dense.items()} | {"lm_head.weight": random(VOCAB, HIDDEN)})
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        tensors = {f"{prefix}self_attn.{name}_proj.weight": square.clone() for name in "qkvo"}
        tensors |= {f"{prefix}{name}_layernorm.weight": vector.clone() for name in ("input", "post_attention")}
        tensors[f"{prefix}block_sparse_moe.gate.weight"] = random(EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            own = f"{prefix}block_sparse_moe.experts.{expert}."
            # One random matrix for all, each expert's in its own scale: a GB of fresh noise would take a while.
            scale = 1 + expert + layer * EXPERTS
            tensors |= {f"{own}w1.weight": up * scale, f"{own}w3.weight": up / scale, f"{own}w2.weight": down * scale}
        write(f"layer-{layer}.safetensors", tensors)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return LAYERS * EXPERTS * 3 * HIDDEN * inner * ITEMSIZE


def resident(pid: int) -> tuple[int, int]:
    """(VmRSS, VmHWM) of a process, in bytes."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    steady, peak = (int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return steady, peak


async def _ready(url: str, worker: asyncio.subprocess.Process) -> None:
    """Wait for the worker's own report that it is ready."""
    bus = await Bus.connect(url, "bench", f"bench-{os.getpid()}")
    fleet = Fleet()
    try:
        await fleet.watch(bus)
        deadline = time.monotonic() + READY_SECONDS
        while not any(s.instance == INSTANCE and s.state == "ready" for s in fleet.live("expert")):
            if worker.returncode is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the worker is not ready (exit code {worker.returncode})")
            await asyncio.sleep(0.05)
    finally:
        await bus.abort()


async def measure(folder: Path, gigabytes: float) -> Memory:
    """Write the checkpoint into `folder`, let one worker load shard 0 of 2, and look."""
    model = folder / "model"
    expert_bytes = write_checkpoint(model, gigabytes)
    port = free_port()
    url = f"nats://127.0.0.1:{port}"
    settings = {"MODEL": str(model), "NATS_URL": url, "INSTANCE": INSTANCE, "EXPERT_SHARDS": "2", "SHARDS": "0"}
    settings["WIDEN_WEIGHTS"] = "off"  # ENABLE_COMPILATION and QUANTIZATION come from the environment
    quiet = {"METRICS_PORT": "0", "LOG_LEVEL": "WARNING"}
    server = await asyncio.create_subprocess_exec(
        *(binary(), "--config", str(write_config(folder, port))), stderr=asyncio.subprocess.DEVNULL
    )
    worker = None
    try:
        worker = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.expert"), env={**os.environ, **settings, **quiet}
        )
        await _ready(url, worker)
        return Memory(expert_bytes, *resident(worker.pid))
    finally:
        for process in (worker, server):
            if process is not None and process.returncode is None:
                process.terminate()
                await process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of all experts")
    parser.add_argument("--folder", type=Path, help="where the checkpoint goes and stays (default: a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="openmoe-bench-") as temporary:
        memory = asyncio.run(measure(arguments.folder or Path(temporary), arguments.gigabytes))
    print(memory)
    return 0 if memory.ok else 1


if __name__ == "__main__":
    sys.exit(main())
