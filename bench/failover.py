"""What the death of a replica costs beyond its capacity: `python -m bench.failover [--model DIR] [--simulated]`.

One shard, and in turns, `--rounds` times:

- one: one replica from the start, T1 tokens/s;
- two: two replicas, T2 tokens/s;
- killed: two replicas, of which one after the other is killed (SIGKILL) every `--every` seconds and started again by
  the supervisor;
- starting: two replicas, and beside them a worker of another deployment is killed and started as often: what starting
  takes from the cores that serve, which is no cost of the death.

By the workers' own reports `killed` had one replica for a share t1 of its time and two for t2, so that t1·T1 + t2·T2 is
what capacity explains. Printed is one JSON object for each round, and one with the medians:

- `tokens_per_second` of each, and `two_ready`, the share of time with two replicas;
- `of_expected`: killed over t1·T1 + t2·T2; 1 - `of_expected` is what the deaths cost;
- `of_expected_while_starting`: the same with T2 of `starting` in place of T2, and T1 as much less;
- `of_one`: killed over T1;
- `wait_after_kill`: seconds, the longest wait for a token of any stream after a kill: [median, greatest];
- `failed`, `wrong`: requests; every answer is compared with the undisturbed one, as in `openmoe chaos`.

`--simulated`: workers sleep for every token in place of computing
(SIMULATED_PAIR_MS, see bench.growth), so that two of them have twice the capacity of one, however few cores there are.
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
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.benchmark_http import Client
from services.chaos_fleet import Chaos
from services.chaos_load import Load, questions
from services.chaos_report import longest_waits, tokens_per_second
from services.chaos_schedule import Strike
from services.local import Plan, Stack, completing, kept
from shared import subjects
from shared.bus import Bus
from shared.settings import DEMO_MODEL

SIMULATED_PAIR_MS = 0.5
SETTLE_SECONDS = 3.0
TICK_SECONDS = 0.02
QUESTIONS, ANSWER_SECONDS = 8, 120.0


@dataclass(frozen=True)
class Window:
    """What one turn came to."""

    tokens_per_second: float
    two_ready: float
    """Share of the time with two replicas."""
    failed: int = 0
    wrong: int = 0
    waits: tuple[float, ...] = ()
    """After each kill: seconds of the longest wait for a token, of all streams."""


def of_expected(one: float, two: float, killed: Window) -> float:
    """`killed` over what one and two replicas would have done in its time."""
    return killed.tokens_per_second / ((1 - killed.two_ready) * one + killed.two_ready * two)


def kills(seconds: float, every: float) -> list[Strike]:
    """One replica after the other, from the start of the window on, every so often."""
    times = [n * every for n in range(int(seconds / every))]
    return [Strike(n, SETTLE_SECONDS + at, "expert", n % 2, "kill") for n, at in enumerate(times)]


async def measure(load: Load, chaos: Chaos, seconds: float, streams: int) -> Window:
    """One turn, with the strikes that wait in `chaos`."""
    start = time.monotonic()
    window = (start + SETTLE_SECONDS, start + SETTLE_SECONDS + seconds)
    looks: list[bool] = []

    async def watch() -> None:
        while (now := time.monotonic()) < window[1]:
            chaos.tick(now, start)
            if now >= window[0]:
                looks.append(sum(m.ready for m in chaos.members(now) if m.kind == "expert") >= 2)
            await asyncio.sleep(TICK_SECONDS)

    async with asyncio.TaskGroup() as group:
        group.create_task(watch(), name="watch")
        asked = await load.stream(streams, lambda: time.monotonic() >= window[1])
    failed, wrong = sum(bool(a.failure) for a in asked), sum(bool(a.wrong) for a in asked)
    waits = tuple(longest_waits(asked, chaos.done, window[1]))
    return Window(tokens_per_second(asked, window), statistics.fmean(looks), failed, wrong, waits)


@contextlib.asynccontextmanager
async def strangers(nats_url: str, model: Path, every: float) -> AsyncIterator[None]:
    """Kill and start a worker of another deployment every so often while the block lasts."""
    environment = {**os.environ, "NATS_URL": nats_url, "MODEL": str(model), "SERVED_MODEL_NAME": "stranger"}
    environment |= {"EXPERT_SHARDS": "1", "METRICS_PORT": "0", "INSTANCE": "stranger"}

    async def again() -> None:
        await asyncio.sleep(SETTLE_SECONDS)
        while True:
            nowhere = asyncio.subprocess.DEVNULL
            command = (sys.executable, "-m", "services.expert")
            process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=nowhere, stderr=nowhere)
            try:
                await asyncio.sleep(every)
            finally:
                process.kill()
                await process.wait()

    task = asyncio.create_task(again(), name="strangers")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def turns(arguments: argparse.Namespace, experts: int, order: list[str]) -> dict[str, Window]:
    """The turns of `order` on one stack."""
    settings = {"ENABLE_CACHING": "false"}
    if arguments.simulated:
        settings["SIMULATED_PAIR_MS"] = str(SIMULATED_PAIR_MS)
    with tempfile.TemporaryDirectory(prefix="openmoe-failover-") as folder, Path(os.devnull).open("w") as log:  # noqa: ASYNC230
        plan = Plan(arguments.model, port=0, experts=experts, routers=arguments.routers, shards=1)
        stack = Stack(plan, Path(folder), settings=settings, output=log)
        stack.nats_url = ""
        async with kept(stack, completing(stack, show=False)) as tasks:
            await next(task for task in tasks if task.get_name() == "announce")
            client = Client(stack.url, stack.gateway.api_auth_token)
            bus = await Bus.connect(stack.nats_url, "failover", "failover")
            chaos = Chaos(stack.children, [])
            try:
                await bus.watch(subjects.STATUS_ALL, chaos.on_message)
                load = Load(client, questions(1, QUESTIONS, arguments.max_tokens), ANSWER_SECONDS, 1)
                await load.learn()
                found = {}
                for name in order:
                    while not all(member.ready for member in chaos.members(time.monotonic())):
                        chaos.tick(time.monotonic(), time.monotonic())
                        await asyncio.sleep(TICK_SECONDS)
                    chaos.waiting = kills(arguments.seconds, arguments.every) if name == "killed" else []
                    chaos.done.clear()
                    starting = strangers(stack.nats_url, arguments.model, arguments.every)
                    async with starting if name == "starting" else contextlib.nullcontext():
                        found[name] = await measure(load, chaos, arguments.seconds, arguments.streams)
            finally:
                client.close()
                await bus.abort()
    return found


def summary(rounds: list[dict[str, Window]]) -> dict[str, Any]:
    """The medians; a round's ratio is of its own turns, as the machine may change between rounds."""

    def median(values: list[float]) -> float:
        return round(statistics.median(values), 4)

    waits = [wait for r in rounds for wait in r["killed"].waits]
    ratios = [of_expected(r["one"].tokens_per_second, r["two"].tokens_per_second, r["killed"]) for r in rounds]
    while_starting = []
    for r in rounds:
        one, two, starting = (r[name].tokens_per_second for name in ("one", "two", "starting"))
        while_starting.append(of_expected(one * starting / two, starting, r["killed"]))
    return {
        "tokens_per_second": {name: median([r[name].tokens_per_second for r in rounds]) for name in rounds[0]},
        "two_ready": median([r["killed"].two_ready for r in rounds]),
        "of_expected": median(ratios),
        "of_expected_least": round(min(ratios), 4),
        "of_expected_greatest": round(max(ratios), 4),
        "of_expected_while_starting": median(while_starting),
        "wait_after_kill": [median(waits), round(max(waits), 4)] if waits else None,
        "of_one": median([r["killed"].tokens_per_second / r["one"].tokens_per_second for r in rounds]),
        "failed": sum(w.failed for r in rounds for w in r.values()),
        "wrong": sum(w.wrong for r in rounds for w in r.values()),
    }


async def run(arguments: argparse.Namespace) -> None:
    rounds: list[dict[str, Window]] = []
    for number in range(arguments.rounds):
        order = ["two", "killed", "starting"] if number % 2 == 0 else ["starting", "killed", "two"]
        found = {**await turns(arguments, 1, ["one"]), **await turns(arguments, 2, order)}
        rounds.append({name: found[name] for name in ("one", "two", "starting", "killed")})
        print(json.dumps({"round": number + 1, **summary(rounds[-1:])}), flush=True)
    print(json.dumps({"rounds": len(rounds), "simulated": arguments.simulated, **summary(rounds)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="a Hugging Face folder")
    parser.add_argument("--simulated", action="store_true", help="workers sleep in place of computing")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=40, help="of each turn")
    parser.add_argument("--every", type=float, default=10, help="seconds between two kills")
    parser.add_argument("--routers", type=int, default=2, help="a router's call goes to one replica: two use both")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
