"""Generation against transformers on the same machine, in turns: `python -m bench.generation olmoe`.

Three rows: one stream, 16 streams (128 prompt tokens, 64 new ones), and the prefill of 1024 tokens. Each round measures
the peer and then the project; the printed ratio is the median over the rounds, with the least and the greatest.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from bench.checkpoints import SHAPES, write
from bench.stack import stack

LOAD_SECONDS = 600
PEER_SECONDS = 600


@dataclass(frozen=True)
class Row:
    """One measurement: `streams` prompts at once."""

    name: str
    streams: int
    prompt_tokens: int
    max_tokens: int

    @property
    def counted(self) -> int:
        """Tokens that the rate counts: new ones, or the prompt's where only one is made."""
        return self.streams * (self.max_tokens if self.max_tokens > 1 else self.prompt_tokens)


ROWS = (
    Row("1 stream, output tokens/s", 1, 128, 64),
    Row("16 streams, output tokens/s", 16, 128, 64),
    Row("prefill of 1024, tokens/s", 1, 1024, 1),
)


class Peer:
    """A process that runs transformers; idle between requests."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, path: Path, threads: int, experts: str) -> Peer:
        command = (sys.executable, "-m", "bench.transformers_peer", str(path), str(threads), experts)
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        peer = cls(process)
        if await peer._line(LOAD_SECONDS) != "ready":
            raise SystemExit("transformers does not load the checkpoint")
        return peer

    async def _line(self, seconds: float) -> str:
        assert self._process.stdout is not None  # noqa: S101 - asked for above
        async with asyncio.timeout(seconds):
            return (await self._process.stdout.readline()).decode().strip()

    async def run(self, prompts: list[list[int]], max_tokens: int) -> float:
        """Seconds that these prompts took, together."""
        assert self._process.stdin is not None  # noqa: S101 - asked for above
        self._process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": max_tokens}).encode() + b"\n")
        return float(json.loads(await self._line(PEER_SECONDS))["seconds"])

    async def stop(self) -> None:
        self._process.terminate()
        await self._process.wait()


async def ask(client: httpx.AsyncClient, prompt: list[int], max_tokens: int) -> None:
    """One streamed completion that must have exactly `max_tokens` tokens."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    usage = None
    async with client.stream("POST", "/v1/completions", json={**body, "stream_options": {"include_usage": True}}) as r:
        r.raise_for_status()
        async for line in r.aiter_lines():
            if line.startswith("data: {") and '"usage":null' not in line:
                usage = json.loads(line.removeprefix("data: ")).get("usage") or usage
    if usage is None or usage["completion_tokens"] != max_tokens:
        raise SystemExit(f"the answer has not {max_tokens} tokens: {usage}")


async def ours(client: httpx.AsyncClient, prompts: list[list[int]], max_tokens: int) -> float:
    """Seconds that these prompts took, sent at once."""
    start = time.perf_counter()
    await asyncio.gather(*(ask(client, prompt, max_tokens) for prompt in prompts))
    return time.perf_counter() - start


async def measure(path: Path, vocabulary: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    draw = random.Random(arguments.seed)
    peer = await Peer.start(path, arguments.peer_threads, arguments.peer_experts)
    results = []
    try:
        async with (
            stack("--model", str(path), "--experts", str(arguments.experts)) as url,
            httpx.AsyncClient(base_url=url, timeout=PEER_SECONDS, trust_env=False) as client,
        ):
            for row in ROWS:
                peers: list[float] = []
                own: list[float] = []
                for number in range(arguments.rounds + 1):
                    prompts = [
                        [draw.randrange(10, vocabulary) for _ in range(row.prompt_tokens)] for _ in range(row.streams)
                    ]
                    theirs, mine = await peer.run(prompts, row.max_tokens), await ours(client, prompts, row.max_tokens)
                    if number:  # the first round warms up
                        peers.append(row.counted / theirs)
                        own.append(row.counted / mine)
                ratios = sorted(mine / theirs for mine, theirs in zip(own, peers, strict=True))
                result = {
                    "row": row.name,
                    "transformers": round(statistics.median(peers), 1),
                    "openmoe": round(statistics.median(own), 1),
                    "ratio": round(statistics.median(ratios), 2),
                    "ratio_least": round(ratios[0], 2),
                    "ratio_greatest": round(ratios[-1], 2),
                }
                results.append(result)
                print(json.dumps(result), flush=True)
    finally:
        await peer.stop()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help=f"one of {', '.join(sorted(SHAPES))}, which is made")
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here (default: it is made anew)")
    parser.add_argument("--experts", type=int, default=2, help="expert workers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer-threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--peer-experts", default="grouped_mm", choices=["grouped_mm", "eager", "batched_mm"])
    arguments = parser.parse_args()
    if arguments.checkpoint not in SHAPES:
        parser.error(f"{arguments.checkpoint} is none of {', '.join(sorted(SHAPES))}")
    vocabulary = SHAPES[arguments.checkpoint][1]["vocab_size"]
    with tempfile.TemporaryDirectory(prefix="openmoe-bench-") as temporary:
        path = write(arguments.checkpoint, (arguments.folder or Path(temporary)) / arguments.checkpoint)
        asyncio.run(measure(path, vocabulary, arguments))


if __name__ == "__main__":
    main()
