"""How long is a shard without its only worker? `python -m bench.takeover --model DIR --repeats 5`.

Starts nats-server, a router, a gateway and expert workers (nothing restarts them by itself) and keeps `--streams`
streams busy. Again and again it kills (or, with `--signal stop`, stops) a worker that alone holds a shard, and
measures, in seconds from that moment:

- starts: another worker has noticed and begins to load (its log line `expert.takeover`);
- serves: it answers for the shard (`expert.taken_over`);
- next token: the streams that were cut by it go on (median and greatest over the streams; the gap's end).

Then a new worker is started in place of the lost one, so that the next round has somebody to take over. Prints a table
and, with `--json FILE`, writes the figures. Exit code 1 if a stream failed, if it came back with other tokens than the
same stream without faults (greedy, so each prompt has one right answer), or if a takeover started later than `--limit`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import uvloop

from services.nats_server import answers_as, binary, free_port, write_config
from shared.bus import Bus
from shared.checkpoint import Checkpoint
from shared.settings import DEMO_MODEL
from shared.status import Fleet, Status

READY_SECONDS = 300.0
TAKEOVER_SECONDS = 120.0
STOP_SECONDS = 20.0
PAUSE_SECONDS = 3.0
"""Between two faults, at least: streams run, reports are heard."""
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


async def until(what: Callable[[], object], name: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {seconds:g} s for {name}")
        await asyncio.sleep(0.02)


@dataclass
class Process:
    """One process of the stack, and its log."""

    name: str
    process: asyncio.subprocess.Process
    log: Path

    def said(self, event: str, since: float) -> tuple[float, dict[str, Any]] | None:
        """(Unix time, line) of the first line of that event after `since`."""
        for raw in self.log.read_text(errors="replace").splitlines():
            if raw.startswith("{") and f'"{event}"' in raw:
                line = json.loads(raw)
                when = datetime.fromisoformat(line["timestamp"]).timestamp()
                if line["event"] == event and when >= since:
                    return when, line
        return None

    async def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self.process.wait()
        except TimeoutError:
            self.process.kill()
            await self.process.wait()


@dataclass
class Site:
    """The stack, as processes of ours that nobody restarts."""

    folder: Path
    settings: dict[str, str]
    fleet: Fleet
    deployment: str
    processes: dict[str, Process] = field(default_factory=dict)
    started: int = 0

    async def start(self, service: str) -> Process:
        self.started += 1
        name = f"{service}-{self.started}"
        log = self.folder / f"{name}.log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", f"services.{service}"),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **self.settings, "INSTANCE": name},
            )
        self.processes[name] = Process(name, process, log)
        return self.processes[name]

    def ready(self, service: str) -> list[Status]:
        return [s for s in self.fleet.live(service) if s.deployment == self.deployment and s.state == "ready"]

    async def all_ready(self) -> None:
        def are() -> bool:
            for name, process in self.processes.items():
                if process.process.returncode is not None:
                    raise SystemExit(f"{name} ended: {process.log.read_text(errors='replace')[-2000:]}")
            ready = {s.instance for service in ("expert", "router", "gateway") for s in self.ready(service)}
            return ready >= set(self.processes)

        await until(are, "all services to be ready", READY_SECONDS)

    def alone(self, num_shards: int) -> tuple[str, list[int]]:
        """A worker that is the only one for some shards, and these; the one with most of them."""
        holders: dict[int, list[str]] = {shard: [] for shard in range(num_shards)}
        for status in self.ready("expert"):
            for shard in status.shards:
                holders[shard].append(status.instance)
        single: dict[str, list[int]] = {}
        for shard, names in holders.items():
            if len(names) == 1:
                single.setdefault(names[0], []).append(shard)
        if not single:
            raise SystemExit("no worker is the only one for a shard: use as many workers as shards, or fewer")
        return max(single.items(), key=lambda item: (len(item[1]), item[0]))


@dataclass
class Stream:
    """One prompt, asked again and again: its right answer, and when its tokens came."""

    prompt: list[int]
    right: str = ""
    times: list[float] = field(default_factory=list)
    """Unix times, of all pieces with text or tokens."""
    done: int = 0
    failures: list[str] = field(default_factory=list)

    async def once(self, client: httpx.AsyncClient, max_tokens: int) -> str:
        body = {"prompt": self.prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        text, ended = "", False
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                raise ValueError((await answer.aread()).decode()[:300])
            async for line in answer.aiter_lines():
                ended = ended or line == "data: [DONE]"
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise ValueError(str(event["error"]))
                    self.times.append(time.time())
                    text += "".join(choice["text"] for choice in event["choices"])
        if not ended:
            raise ValueError("the stream ended without [DONE]")
        return text

    async def run(self, client: httpx.AsyncClient, max_tokens: int, stop: asyncio.Event) -> None:
        while not stop.is_set():
            try:
                text = await self.once(client, max_tokens)
            except (ValueError, httpx.HTTPError) as error:
                self.failures.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.1)
                continue
            self.done += 1
            if text != self.right:
                self.failures.append("other tokens than without faults")

    def gap_end(self, fault: float, until: float) -> float:
        """When the longest pause that ends between `fault` and `until` ends, in seconds after `fault`."""
        before = max((t for t in self.times if t <= fault), default=fault)
        after = [before, *(t for t in self.times if fault < t <= until)]
        pauses = [(b - a, b) for a, b in itertools.pairwise(after)]
        return max(pauses)[1] - fault if pauses else float("nan")


@dataclass(frozen=True)
class Round:
    """What one fault came to; seconds after it."""

    lost: str
    shards: list[int]
    heir: str
    reason: str
    starts: float
    serves: float
    load: float
    next_token_median: float
    next_token_max: float


@contextlib.asynccontextmanager
async def site(arguments: argparse.Namespace, folder: Path) -> AsyncIterator[tuple[Site, str]]:
    """The stack, ready, and its URL."""
    port, name = free_port(), f"takeover-{os.urandom(4).hex()}"
    with (folder / "nats.log").open("wb") as output:
        nats = await asyncio.create_subprocess_exec(
            *(binary(), "--config", str(write_config(folder, port, name))), stdout=output, stderr=output
        )
    made: Site | None = None
    bus: Bus | None = None
    try:
        deadline = time.monotonic() + STOP_SECONDS
        while not await answers_as(port, name):
            if time.monotonic() > deadline:
                raise SystemExit("nats-server does not start")
            await asyncio.sleep(0.02)
        http_port = free_port()
        settings = {
            "ENV": "staging",  # logs as JSON
            "LOG_LEVEL": "INFO",
            "MODEL": str(arguments.model),
            "SERVED_MODEL_NAME": "takeover",
            "NATS_URL": f"nats://127.0.0.1:{port}",
            "EXPERT_SHARDS": str(arguments.shards),
            "WORKERS": str(arguments.workers),
            "PORT": str(http_port),
            "METRICS_PORT": "0",
            "EXPERT_RECOVERY_SECONDS": str(arguments.recovery),
            "TIMEOUT_SECONDS": str(arguments.recovery + 30),
        }
        bus = await Bus.connect(settings["NATS_URL"], "bench", f"bench-{os.getpid()}")
        fleet = Fleet()
        await fleet.watch(bus)
        made = Site(folder, settings, fleet, Checkpoint.open(arguments.model).deployment("takeover"))
        for service in [*["expert"] * arguments.workers, "router", "gateway"]:
            await made.start(service)
        await made.all_ready()
        yield made, f"http://127.0.0.1:{http_port}"
    finally:
        if made is not None:
            for service in ("gateway", "router", "expert"):
                ours = [p for p in made.processes.values() if p.name.startswith(service)]
                await asyncio.gather(*(p.end() for p in ours if p.process.returncode is None))
        if bus is not None:
            await bus.abort()
        if nats.returncode is None:
            nats.terminate()
        await nats.wait()


async def fault(made: Site, arguments: argparse.Namespace, streams: list[Stream]) -> Round:
    """One worker lost, and all that follows, to a stack that is whole again."""
    victim, shards = made.alone(arguments.shards)
    process = made.processes[victim].process
    died = time.time()
    process.send_signal(SIGNALS[arguments.signal])

    def found(event: str) -> list[tuple[float, dict[str, Any], str]]:
        lines = [(p.said(event, died), p.name) for p in made.processes.values() if p.name.startswith("expert")]
        return sorted(((*line, name) for line, name in lines if line is not None), key=lambda each: each[0])

    await until(lambda: found("expert.takeover"), "a takeover", TAKEOVER_SECONDS)
    starts, line, heir = found("expert.takeover")[0]
    await until(lambda: found("expert.taken_over"), "its end", TAKEOVER_SECONDS)
    serves, end, _ = found("expert.taken_over")[0]
    counts = [len(stream.times) for stream in streams]
    await until(
        lambda: all(len(s.times) > count + 10 for s, count in zip(streams, counts, strict=True)),
        "all streams to go on",
        TAKEOVER_SECONDS,
    )
    ends = [stream.gap_end(died, time.time()) for stream in streams]
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()
    made.processes.pop(victim)
    await made.start("expert")
    await made.all_ready()
    await asyncio.sleep(PAUSE_SECONDS)
    return Round(
        victim,
        shards,
        heir,
        line["reason"],
        round(starts - died, 2),
        round(serves - died, 2),
        end["load_seconds"],
        round(statistics.median(ends), 2),
        round(max(ends), 2),
    )


async def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    vocabulary = Checkpoint.open(arguments.model).config.vocab_size
    streams = [
        Stream([(7 + 31 * number + 13 * n) % vocabulary for n in range(arguments.prompt_tokens)])
        for number in range(arguments.streams)
    ]
    rounds: list[Round] = []
    async with (
        site(arguments, folder) as (made, url),
        httpx.AsyncClient(base_url=url, timeout=arguments.recovery + 60, trust_env=False) as client,
    ):
        # The right answers, computed together as they will be: a token's result does not depend on its batch.
        for stream, text in zip(
            streams, await asyncio.gather(*(s.once(client, arguments.max_tokens) for s in streams)), strict=True
        ):
            stream.right = text
        stop = asyncio.Event()
        running = [asyncio.create_task(s.run(client, arguments.max_tokens, stop)) for s in streams]
        try:
            await asyncio.sleep(PAUSE_SECONDS)
            for number in range(arguments.repeats):
                rounds.append(await fault(made, arguments, streams))
                print(f"{number + 1} of {arguments.repeats}: {rounds[-1]}", file=sys.stderr)
            stop.set()
            await asyncio.gather(*running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
    failures = [failure for stream in streams for failure in stream.failures]
    late = [r for r in rounds if r.starts > arguments.limit]
    return {
        "model": arguments.model.name,
        "signal": arguments.signal,
        "workers": arguments.workers,
        "shards": arguments.shards,
        "streams": arguments.streams,
        "completions": sum(stream.done for stream in streams),
        "failures": failures,
        "rounds": [asdict(r) for r in rounds],
        "problems": [
            *([f"{len(failures)} streams failed or differ"] if failures else []),
            *([f"{len(late)} takeovers started after more than {arguments.limit:g} s"] if late else []),
        ],
    }


def table(result: dict[str, Any]) -> str:
    """The rounds, and their median and greatest, as Markdown."""
    rounds = result["rounds"]
    columns = ("starts", "serves", "load", "next_token_median", "next_token_max")
    lines = ["| | reason | " + " | ".join(c.replace("_", " ") + ", s" for c in columns) + " |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    for number, each in enumerate(rounds, 1):
        lines.append(f"| {number} | {each['reason']} | " + " | ".join(f"{each[c]:.2f}" for c in columns) + " |")
    for name, of in (("median", statistics.median), ("greatest", max)):
        lines.append(f"| {name} | | " + " | ".join(f"{of([each[c] for each in rounds]):.2f}" for c in columns) + " |")
    return "\n".join(lines)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="a Hugging Face folder")
    parser.add_argument("--signal", choices=sorted(SIGNALS), default="kill")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--recovery", type=float, default=60, help="EXPERT_RECOVERY_SECONDS of the router")
    parser.add_argument("--limit", type=float, default=3.0, help="seconds in which a takeover must start")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args(given)
    with tempfile.TemporaryDirectory(prefix="takeover-") as folder:
        result = uvloop.run(measure(arguments, Path(folder)))
    print(table(result))
    print(json.dumps({key: value for key, value in result.items() if key != "rounds"}, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    sys.exit(1 if result["problems"] else 0)


if __name__ == "__main__":
    main()
