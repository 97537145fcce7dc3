"""One MoE layer as a service against mosec on the same machine, in turns: `python -m bench.forward`.

The layer: hidden size 768, 8 experts of which a token takes 2, SwiGLU 2048, float32. 64 connections send one row per
request, as raw float32 or msgpack, the next as soon as the last is answered. The peer is mosec with dynamic batching
and the same layer in torch, by default as it was fastest where we measured; the project is `openmoe up`. One process
makes the load for both, and compares a sample of the answers with the layer computed in float64. Prints a line of JSON
per round, then the medians and the ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors.numpy import load_file

from bench.checkpoints import write
from bench.http_load import RAW, Order
from bench.stack import stack
from services.nats_server import free_port

ROWS = 512
START_SECONDS = 120
MEDIA_TYPES = {"raw": RAW, "msgpack": "application/msgpack"}
Figures = dict[str, Any]


def write_rows(folder: Path, checkpoint: Path) -> None:
    """Random rows [R, H] and what the layer makes of them, computed in float64 from the checkpoint's own tensors."""
    tensors: dict[str, Any] = {}
    for file in checkpoint.glob("*.safetensors"):
        tensors |= load_file(file)

    def named(name: str) -> Any:
        return tensors[f"model.layers.0.block_sparse_moe.{name}.weight"].astype(np.float64)

    gate = named("gate")  # [E, H]
    rows = np.random.default_rng(0).standard_normal((ROWS, gate.shape[1])).astype(np.float32)
    x = rows.astype(np.float64)
    scores = np.exp(x @ gate.T)  # [R, E]; small enough to need no shift
    expected = np.zeros_like(x)
    weights = np.zeros_like(scores)
    chosen = np.argsort(-scores, axis=1)[:, :2]
    np.put_along_axis(weights, chosen, np.take_along_axis(scores, chosen, 1), 1)
    weights /= weights.sum(axis=1, keepdims=True)
    for expert in range(gate.shape[0]):
        gate_proj, up, down = (named(f"experts.{expert}.{name}") for name in ("w1", "w3", "w2"))
        y = x @ gate_proj.T
        expected += weights[:, expert : expert + 1] * ((y / (1 + np.exp(-y)) * (x @ up.T)) @ down.T)
    np.save(folder / "rows.npy", rows)
    np.save(folder / "expected.npy", expected.astype(np.float32))


@contextlib.asynccontextmanager
async def child(*command: str, **environment: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that lives as long as it is needed."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, **environment},
        limit=2**20,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


class Load:
    """The process that makes the load."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def line(self) -> str:
        assert self._process.stdout is not None  # noqa: S101 - asked for above
        return (await self._process.stdout.readline()).decode().strip()

    async def run(self, order: Order) -> Figures:
        assert self._process.stdin is not None  # noqa: S101 - asked for above
        self._process.stdin.write(msgspec.json.encode(order) + b"\n")
        async with asyncio.timeout(order.seconds + 120):
            figures: Figures = json.loads(await self.line())
        return figures


@contextlib.asynccontextmanager
async def peer(checkpoint: Path, media_type: str, arguments: argparse.Namespace) -> AsyncIterator[int | None]:
    """The port of mosec once it answers; None where it is not installed."""
    if importlib.util.find_spec("mosec") is None:
        print("mosec is not installed (pip install 'openmoe[bench]'); the project alone is measured", file=sys.stderr)
        yield None
        return
    from bench.mosec_peer import PeerSettings

    settings = PeerSettings(
        folder=str(checkpoint),
        media_type=media_type,
        workers=arguments.peer_workers,
        threads=arguments.peer_threads,
        batch=arguments.peer_batch,
        wait_ms=arguments.peer_wait_ms,
        packed=not arguments.peer_plain,
    )
    port = free_port()
    command = (sys.executable, "-m", "bench.mosec_peer", "--address", "127.0.0.1", "--port", str(port))
    async with child(*command, "--log-level", "error", **settings.environment()) as process:
        async with asyncio.timeout(START_SECONDS):
            while True:
                with contextlib.suppress(OSError):
                    await asyncio.open_connection("127.0.0.1", port)
                    break
                if process.returncode is not None:
                    raise SystemExit("mosec ended before it was ready")
                await asyncio.sleep(0.1)
        yield port


async def measure(folder: Path, arguments: argparse.Namespace) -> None:
    checkpoint = write("layer", (arguments.folder or folder) / "layer")
    write_rows(folder, checkpoint)
    media_type = MEDIA_TYPES[arguments.body]
    async with child(sys.executable, "-m", "bench.http_load", str(folder)) as process:
        load = Load(process)
        if await load.line() != "ready":
            raise SystemExit("the load generator does not start")

        async def one(port: int, target: str) -> Figures:
            figures = await load.run(Order(port, target, media_type, arguments.connections, arguments.seconds))
            if "failure" in figures:
                raise SystemExit(f"{target}: {figures['failure']}")
            return figures

        async with (
            peer(checkpoint, media_type, arguments) as peer_port,
            stack("--model", str(checkpoint), "--experts", str(arguments.experts)) as url,
        ):
            own_port = int(url.rpartition(":")[2])
            peers: list[Figures] = []
            own: list[Figures] = []
            for number in range(arguments.rounds + 1):
                theirs = await one(peer_port, "/inference") if peer_port else None
                mine = await one(own_port, "/v1/moe/forward?layer=0")
                if number:  # the first round warms up
                    own.append(mine)
                    peers += [theirs] if theirs else []
                    print(json.dumps({"round": number, "mosec": theirs, "openmoe": mine}), flush=True)
        print(json.dumps(summary(own, peers)))


def summary(own: list[Figures], peers: list[Figures]) -> Figures:
    """Medians over the rounds, and the ratios of requests/s with the least and the greatest."""

    def medians(rounds: list[Figures]) -> Figures:
        return {
            name: round(statistics.median(each[name] for each in rounds), 1)
            for name in ("requests_per_second", "p50_ms", "p99_ms")
        }

    result: Figures = {"row": "one MoE layer, requests/s", "openmoe": medians(own)}
    if peers:
        ratios = [m["requests_per_second"] / t["requests_per_second"] for m, t in zip(own, peers, strict=True)]
        result |= {
            "mosec": medians(peers),
            "ratio": round(statistics.median(ratios), 2),
            "ratio_least": round(min(ratios), 2),
            "ratio_greatest": round(max(ratios), 2),
            "p99_ratio": round(
                statistics.median(m["p99_ms"] / t["p99_ms"] for m, t in zip(own, peers, strict=True)), 2
            ),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here (default: it is made anew)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--body", choices=sorted(MEDIA_TYPES), default="raw")
    parser.add_argument("--experts", type=int, default=2, help="expert workers of the project")
    parser.add_argument("--peer-workers", type=int, default=1)
    parser.add_argument("--peer-threads", type=int, default=2, help="torch's, in each of the peer's workers")
    parser.add_argument("--peer-batch", type=int, default=64, help="mosec's max_batch_size")
    parser.add_argument("--peer-wait-ms", type=int, default=1, help="mosec's max_wait_time")
    parser.add_argument("--peer-plain", action="store_true", help="plain F.linear in the peer, no packed weights")
    with tempfile.TemporaryDirectory(prefix="openmoe-bench-") as temporary:
        asyncio.run(measure(Path(temporary), parser.parse_args()))


if __name__ == "__main__":
    main()
