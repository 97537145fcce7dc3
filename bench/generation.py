"""Generation against peers on the same machine, in turns: `python -m bench.generation olmoe`.

Three rows: one stream, 16 streams (128 prompt tokens, 64 new ones), and the prefill of 1024 tokens. Each round measures
every peer and then the project. A ratio is the project's tokens/s by a peer's in the same round: the median over the
rounds, with the least and the greatest. A line of JSON for each row, then all of them as a table.

Peers are transformers' `generate` and llama.cpp (through llama-cpp-python; the checkpoint is converted to GGUF). What
is not installed is left out. vLLM is no peer here: nothing in this script can measure it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil

from bench.checkpoints import SHAPES, write
from bench.peers import ANSWER_SECONDS, KINDS, LLAMA_CPP, PeerKind, choose, peer
from bench.stack import stack

T = TypeVar("T")

DISTURBED_CORES = 0.1
"""Other processes' use of the cores from which on a row is not to be believed: a peer's threads spin for each other, so
a core that is shared costs them most of their speed, and the project, whose processes wait for messages, little."""


@dataclass(frozen=True)
class Row:
    """One measurement: `streams` prompts at once."""

    key: str
    """Its name on the command line."""
    name: str
    streams: int
    prompt_tokens: int
    max_tokens: int

    @property
    def counted(self) -> int:
        """Tokens that the rate counts: new ones, or the prompt's where only one is made."""
        return self.streams * (self.max_tokens if self.max_tokens > 1 else self.prompt_tokens)


ROWS = (
    Row("one", "1 stream, output tokens/s", 1, 128, 64),
    Row("sixteen", "16 streams, output tokens/s", 16, 128, 64),
    Row("prefill", "prefill of 1024, tokens/s", 1, 1024, 1),
)


class Others:
    """What other processes of the machine take of its cores while something is measured."""

    def __init__(self) -> None:
        self._start = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Now, and CPU seconds: the machine's, and those of this process and all below it."""
        times = psutil.cpu_times()
        own = 0.0
        me = psutil.Process()
        for process in (me, *me.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                used = process.cpu_times()
                own += used.user + used.system
        return time.monotonic(), times.user + times.nice + times.system, own

    def cores(self) -> float:
        """Cores that others kept busy since this was made."""
        (since, all_before, own_before), (now, all_now, own_now) = self._start, self._read()
        return max(0.0, (all_now - all_before) - (own_now - own_before)) / (now - since)


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


def result(row: str, own: Sequence[float], peers: dict[str, list[float]], others: Sequence[float]) -> dict[str, Any]:
    """One row's figures: rates in tokens/s, of which `own` and each peer have one per round, and their ratios.

    `best` is the peer with the greatest median; `others_cores` is from the round in which `others` took most.
    """
    rates = {name: statistics.median(theirs) for name, theirs in peers.items()}
    ratios = {}
    for name, theirs in peers.items():
        each = sorted(mine / its for mine, its in zip(own, theirs, strict=True))
        ratios[name] = {
            "ratio": round(statistics.median(each), 2),
            "least": round(each[0], 2),
            "greatest": round(each[-1], 2),
        }
    return {
        "row": row,
        "rounds": len(own),
        "openmoe": round(statistics.median(own), 1),
        "peers": {name: {"rate": round(rate, 1), **ratios[name]} for name, rate in rates.items()},
        "best": max(rates, key=lambda name: rates[name]),
        "others_cores": round(max(others), 2),
    }


def table(checkpoint: str, results: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    names = list(results[0]["peers"])
    head = ["checkpoint", "row", *names, "OpenMoE", *(f"ratio to {name}" for name in names), "ratio to the best"]
    lines = [head, ["---"] * len(head)]
    for number, found in enumerate(results):
        peers, best = found["peers"], found["best"]
        ratios = {name: f"{p['ratio']:.2f} ({p['least']:.2f} to {p['greatest']:.2f})" for name, p in peers.items()}
        lines.append(
            [
                checkpoint if not number else "",
                found["row"],
                *(str(p["rate"]) for p in peers.values()),
                str(found["openmoe"]),
                *ratios.values(),
                f"{ratios[best]}, {best}",
            ]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


async def measure(
    path: Path, vocabulary: int, kinds: dict[PeerKind, list[str]], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    draw = random.Random(arguments.seed)
    results = []
    async with contextlib.AsyncExitStack() as running:
        peers = [await running.enter_async_context(peer(kind, its)) for kind, its in kinds.items()]
        url = await running.enter_async_context(stack("--model", str(path), "--experts", str(arguments.experts)))
        client = await running.enter_async_context(
            httpx.AsyncClient(base_url=url, timeout=ANSWER_SECONDS, trust_env=False)
        )
        for row in (r for r in ROWS if r.key in arguments.rows):
            own: list[float] = []
            others: list[float] = []
            theirs: dict[str, list[float]] = {p.name: [] for p in peers}
            for number in range(arguments.rounds + 1):
                prompts = [
                    [draw.randrange(10, vocabulary) for _ in range(row.prompt_tokens)] for _ in range(row.streams)
                ]
                watched = Others()
                seconds = {p.name: await p.run(prompts, row.max_tokens) for p in peers}
                mine = await ours(client, prompts, row.max_tokens)
                speeds = {name: row.counted / s for name, s in {**seconds, "OpenMoE": mine}.items()}
                took = watched.cores()
                told = ", ".join(f"{name} {speed:.1f}" for name, speed in speeds.items())
                when = f"round {number}" if number else "warm-up"
                print(f"{row.name}, {when}: {told} (others: {took:.2f} cores)", file=sys.stderr, flush=True)
                if number:  # the first round warms up
                    own.append(row.counted / mine)
                    others.append(took)
                    for name, its in seconds.items():
                        theirs[name].append(row.counted / its)
            results.append(result(row.name, own, theirs, others))
            print(json.dumps(results[-1]), flush=True)
            if max(others) > DISTURBED_CORES:
                print(
                    f"{row.name}: disturbed, other processes kept {max(others):.2f} cores busy. Peers suffer more from "
                    "that than the project, so the ratio flatters; measure again.",
                    file=sys.stderr,
                )
    return results


async def until_terminated(work: Coroutine[Any, Any, T]) -> T:
    """Do `work`; SIGTERM cancels it, so that what it started is stopped too."""
    task = asyncio.create_task(work, name="measure")
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        raise SystemExit("terminated") from None
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


def peer_arguments(kind: PeerKind, path: Path, arguments: argparse.Namespace) -> list[str]:
    """Of the peer's process, which needs the checkpoint in its own format."""
    threads = str(arguments.peer_threads)
    if kind is LLAMA_CPP:
        from bench import gguf_checkpoint

        return [str(gguf_checkpoint.write(path, path.with_name(f"{path.name}.gguf"))), threads]
    return [str(path), threads, arguments.peer_experts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help=f"one of {', '.join(sorted(SHAPES))}, which is made")
    parser.add_argument("--folder", type=Path, help="keep the checkpoint and its GGUF file here (default: made anew)")
    parser.add_argument("--peers", help=f"of {','.join(KINDS)} (default: all that are installed)")
    parser.add_argument("--rows", default=",".join(r.key for r in ROWS), help="which to measure (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=2, help="expert workers")
    parser.add_argument("--rounds", type=int, default=3, help="after one that warms up")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--peer-threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument(
        "--peer-experts",
        default="grouped_mm",
        choices=["grouped_mm", "eager", "batched_mm"],
        help="transformers' experts_implementation",
    )
    arguments = parser.parse_args()
    if arguments.checkpoint not in SHAPES:
        parser.error(f"{arguments.checkpoint} is none of {', '.join(sorted(SHAPES))}")
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    arguments.rows = arguments.rows.split(",")
    if unknown := set(arguments.rows) - {r.key for r in ROWS}:
        parser.error(f"--rows: {', '.join(sorted(unknown))} is none of {', '.join(r.key for r in ROWS)}")
    try:
        chosen, left_out = choose(arguments.peers)
    except ValueError as error:
        parser.error(str(error))
    for line in left_out:
        print(line, file=sys.stderr)
    vocabulary = SHAPES[arguments.checkpoint][1]["vocab_size"]
    with tempfile.TemporaryDirectory(prefix="openmoe-bench-") as temporary:
        path = write(arguments.checkpoint, (arguments.folder or Path(temporary)) / arguments.checkpoint)
        kinds = {kind: peer_arguments(kind, path, arguments) for kind in chosen}
        results = asyncio.run(until_terminated(measure(path, vocabulary, kinds, arguments)))
    print(f"\n{table(arguments.checkpoint, results)}")


if __name__ == "__main__":
    main()
