"""Dispatch of one layer against a bare nats-py fan-out of the same bytes, in turns: `python -m bench.dispatch`.

The layer: 16 tokens of hidden size 2048, top-2 of 8 experts, 4 shards. The project's side is the router's own dispatch
(grouping, encoding, asking, adding up) and two real worker processes which check and decode each call and answer it
without computing (SIMULATED_PAIR_MS=0). The peer's side is `nats.connect()` and four `request`s at once, of as many
bytes, answered by two processes with as many bytes as a worker's answer has. Prints JSON: medians, p99, the ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import nats
import torch
import uvloop

from bench.checkpoints import write
from services.nats_server import answers_as, binary, free_port, write_config
from services.router.calls import Calls
from services.router.dispatch import BusExperts
from shared.bus import Bus
from shared.checkpoint import Checkpoint
from shared.replicas import Replicas
from shared.status import Fleet

TOKENS, SHARDS, TOP_K, PROCESSES = 16, 4, 2, 2
READY_SECONDS = 60
ROUND_CALLS = 400


@contextlib.asynccontextmanager
async def process(*command: str, **environment: str) -> AsyncIterator[None]:
    child = await asyncio.create_subprocess_exec(
        *command,
        env={**os.environ, **environment},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        child.terminate()
        await child.wait()


async def until(ready: Callable[[], Awaitable[bool]], what: str) -> None:
    try:
        async with asyncio.timeout(READY_SECONDS):
            while not await ready():
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise SystemExit(f"{what} is not there after {READY_SECONDS} s") from None


async def echo(url: str, subjects: list[str], size: int) -> None:
    """The peer's responder: answers each request with `size` bytes."""
    client = await nats.connect(url)
    answer = bytes(size)
    for subject in subjects:

        async def on_message(message: Any) -> None:
            await message.respond(answer)

        await client.subscribe(subject, queue="echo", cb=on_message)
    await asyncio.Event().wait()


async def timed(work: Callable[[], Awaitable[None]], calls: int) -> list[float]:
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        await work()
        seconds.append(time.perf_counter() - start)
    return seconds


async def measure(url: str, checkpoint: Checkpoint, rounds: int) -> dict[str, Any]:
    config = checkpoint.config
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, config.hidden_size, generator=generator).bfloat16()
    weights, index = torch.rand(TOKENS, config.num_experts, generator=generator).topk(TOP_K)
    deployment = checkpoint.deployment("dispatch")
    environment = {
        "NATS_URL": url,
        "MODEL": str(checkpoint.path),
        "SERVED_MODEL_NAME": "dispatch",
        "SIMULATED_PAIR_MS": "0",
        "EXPERT_SHARDS": str(SHARDS),
        "WORKERS": str(PROCESSES),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TORCH_THREADS": "1",
    }
    bus = await Bus.connect(url, "router", "bench-dispatch")
    workers = Replicas("expert", deployment)
    await Fleet(tell=workers.observe).watch(bus)
    calls = Calls(
        bus,
        deployment,
        workers,
        num_shards=SHARDS,
        timeout_seconds=READY_SECONDS,
        recovery_seconds=READY_SECONDS,
    )
    experts = BusExperts(bus, config, calls, num_shards=SHARDS)

    async def dispatch() -> None:
        question = experts.question(0, hidden, index, weights)
        await question.ask()
        question.result()

    with torch.no_grad():
        sizes = [len(call.data) for call in experts.question(0, hidden, index, weights)._calls]  # noqa: SLF001
    rows = [int((index % SHARDS == shard).any(dim=1).sum()) for shard in range(SHARDS)]
    answer_bytes = round(statistics.mean(rows)) * config.hidden_size * 2
    client = await nats.connect(url)
    payloads = [bytes(size) for size in sizes]
    subjects = [f"echo.{shard}" for shard in range(SHARDS)]

    async def fan_out() -> None:
        await asyncio.gather(*(client.request(s, p, timeout=5) for s, p in zip(subjects, payloads, strict=True)))

    async def echoes() -> bool:
        with contextlib.suppress(nats.errors.Error):
            await fan_out()
            return True
        return False

    async with contextlib.AsyncExitStack() as stack:
        for number in range(PROCESSES):
            own = [str(shard) for shard in range(number, SHARDS, PROCESSES)]
            worker = {**environment, "SHARDS": ",".join(own), "INSTANCE": f"bench-{number}"}
            await stack.enter_async_context(process(sys.executable, "-m", "services.expert", **worker))
            echoing = (sys.executable, "-m", "bench.dispatch", "--echo", url, str(answer_bytes), *own)
            await stack.enter_async_context(process(*echoing))
        await until(echoes, "the peer")
        with torch.no_grad():
            await dispatch()
            peers: list[list[float]] = []
            own_times: list[list[float]] = []
            for number in range(rounds + 1):
                theirs, mine = await timed(fan_out, ROUND_CALLS), await timed(dispatch, ROUND_CALLS)
                if number:  # the first round warms up
                    peers.append(theirs)
                    own_times.append(mine)
    await client.close()
    await bus.abort()
    ratios = sorted(
        statistics.median(mine) / statistics.median(theirs) for mine, theirs in zip(own_times, peers, strict=True)
    )

    def ms(rounds_of: list[list[float]], quantile: float) -> float:
        values = sorted(value for values in rounds_of for value in values)
        return round(values[int(quantile * (len(values) - 1))] * 1000, 3)

    return {
        "row": f"dispatch of one layer: {SHARDS} shards, {TOKENS} tokens, hidden {config.hidden_size}, bfloat16",
        "bytes asked": sum(sizes),
        "nats-py p50 ms": ms(peers, 0.5),
        "nats-py p99 ms": ms(peers, 0.99),
        "openmoe p50 ms": ms(own_times, 0.5),
        "openmoe p99 ms": ms(own_times, 0.99),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_least": round(ratios[0], 2),
        "ratio_greatest": round(ratios[-1], 2),
    }


async def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="openmoe-bench-") as temporary:
        folder = Path(temporary)
        checkpoint = Checkpoint.open(write("dispatch", folder / "dispatch"))
        port = free_port()
        config = write_config(folder, port, "bench-dispatch")
        async with process(binary(), "--config", str(config)):
            await until(lambda: answers_as(port, "bench-dispatch"), "nats-server")
            print(json.dumps(await measure(f"nats://127.0.0.1:{port}", checkpoint, arguments.rounds)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--echo", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.echo:
        url, size, *shards = arguments.echo
        uvloop.run(echo(url, [f"echo.{shard}" for shard in shards], int(size)))
    else:
        uvloop.run(run(arguments))


if __name__ == "__main__":
    main()
