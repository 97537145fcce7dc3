"""`openmoe chaos`: a stack of its own under load, whose processes are killed and stopped at random, by a seed.

First every question is asked undisturbed, one at a time: its answer is what it must always be. Then the load runs
undisturbed for a while, for its throughput, and then for the whole time with strikes (services/chaos_schedule.py). A
strike waits until a peer that can stand in is ready by its own report: what is proved is that one process may die, not
that the last one may. At the end the routers and the gateway must say that nothing runs and no KV block is held, every
service must end by SIGTERM with exit code 0, and no process may be left.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from services.benchmark_http import Client, Refusal, TransferError
from services.chaos_fleet import Chaos, Struck
from services.chaos_load import Asked, Load, questions
from services.chaos_schedule import KINDS, Kind, Strike, schedule
from services.local import ChildRefusedError, Plan, Stack, completing, kept
from shared import subjects
from shared.bus import Bus
from shared.errors import StartError
from shared.status import Status

TICK_SECONDS = 0.02
OVERDUE_SECONDS = 60.0
"""A strike whose victim has no ready peer for so long is left out, which fails the run."""
SETTLE_SECONDS = 60.0
TIDY_SECONDS = 15.0
COLUMNS = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))


@dataclass(frozen=True)
class ChaosPlan:
    """What is asked for."""

    model: Path
    seconds: float = 600.0
    strikes: int = 100
    seed: int = 1
    targets: tuple[Kind, ...] = KINDS
    experts: int = 4
    shards: int = 2
    routers: int = 2
    streams: int = 8
    prompts: int = 16
    max_tokens: int = 96
    baseline_seconds: float = 30.0
    timeout: float = 120.0

    @property
    def counts(self) -> dict[Kind, int]:
        """Processes of each kind that may be struck."""
        all_of = {"expert": self.experts, "router": self.routers, "monitor": 1, "nats": 1}
        return {kind: all_of[kind] for kind in self.targets}

    def check(self) -> None:
        """Refuse what could not prove anything.

        Raises:
            StartError: a struck kind has no peers.

        """
        if "expert" in self.targets and self.experts < 2 * self.shards:
            raise StartError(
                f"--experts {self.experts} with --shards {self.shards}: each shard needs two workers; "
                f"give --experts {2 * self.shards}, or leave expert out of --targets"
            )
        if "router" in self.targets and self.routers < 2:
            raise StartError("--routers 1: a router needs a second one; give --routers 2, or leave it out of --targets")


@dataclass
class Outcome:
    """What came of it. Times are of `time.monotonic`."""

    plan: ChaosPlan
    baseline: list[Asked] = field(default_factory=list)
    baseline_window: tuple[float, float] = (0.0, 0.0)
    asked: list[Asked] = field(default_factory=list)
    window: tuple[float, float] = (0.0, 0.0)
    struck: list[Struck] = field(default_factory=list)
    left_out: list[Strike] = field(default_factory=list)
    unwell: list[str] = field(default_factory=list)
    """Processes that did not recover."""
    leaks: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    """Of the questions."""
    interrupted: bool = False


async def run(plan: ChaosPlan, console: Console, log: TextIO) -> Outcome:
    """Do all of it.

    Args:
        plan: what is asked for.
        console: of the progress bars; they show on a terminal only.
        log: what the services say.

    Raises:
        StartError: the stack does not start, or a question is not answered undisturbed.

    """
    plan.check()
    outcome = Outcome(plan)
    with tempfile.TemporaryDirectory(prefix="openmoe-chaos-", ignore_cleanup_errors=True) as folder:
        local = Plan(plan.model, port=0, experts=plan.experts, routers=plan.routers, shards=plan.shards)
        # An answer that a cache remembers would prove nothing.
        stack = Stack(local, Path(folder), settings={"ENABLE_CACHING": "false"}, output=log)
        stack.nats_url = ""  # our own server, whatever NATS_URL says: it is struck too
        descendants: list[psutil.Process] = []
        with Progress(*COLUMNS, console=console, disable=not console.is_terminal, transient=True) as progress:
            starting = progress.add_task("starting the stack", total=None, note="")
            async with kept(stack, completing(stack, show=False)) as tasks:
                await _announced(tasks)
                progress.remove_task(starting)
                client = Client(stack.url, stack.gateway.api_auth_token)
                try:
                    await _measure(plan, stack, client, outcome, progress)
                except asyncio.CancelledError:
                    task = asyncio.current_task()
                    if task is None or not outcome.asked:
                        raise
                    task.uncancel()
                    outcome.interrupted = True
                finally:
                    client.close()
                descendants = psutil.Process().children(recursive=True)
        outcome.leaks += _ended_badly(stack, descendants)
    return outcome


async def _announced(tasks: set[asyncio.Task[None]]) -> None:
    """Wait until the stack completes.

    Raises:
        StartError: a service refused to start.

    """
    (announcing,) = [task for task in tasks if task.get_name() == "announce"]
    waiting = tasks
    try:
        while announcing in waiting:
            finished, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in finished:
                task.result()
    except ChildRefusedError:
        raise StartError("a service does not start; its line in the log says why") from None


async def _measure(plan: ChaosPlan, stack: Stack, client: Client, outcome: Outcome, progress: Progress) -> None:
    asked = questions(plan.seed, plan.prompts, plan.max_tokens)
    outcome.names = [question.name for question in asked]
    load = Load(client, asked, plan.timeout, plan.seed)
    strikes = schedule(plan.seed, plan.strikes, plan.seconds, plan.counts)
    bus = await Bus.connect(stack.nats_url, "chaos", "chaos")
    chaos = Chaos(stack.children, strikes)
    try:
        await bus.watch(subjects.STATUS_ALL, chaos.on_message)
        bar = progress.add_task("asking undisturbed", total=None, note="")
        try:
            await load.learn()
        except TransferError as error:
            raise StartError(str(error)) from None
        progress.update(bar, description="load, undisturbed", total=plan.baseline_seconds)
        start = time.monotonic()
        end = start + plan.baseline_seconds
        async with _doing(lambda: _show(progress, bar, load, chaos, start)):
            outcome.baseline = await load.stream(plan.streams, lambda: time.monotonic() >= end)
        outcome.baseline_window = (start, end)
        await _until(lambda: all(m.ready for m in chaos.members(time.monotonic())), SETTLE_SECONDS)
        progress.update(bar, description="load, with strikes", total=plan.seconds)
        load.asked.clear()
        outcome.asked, outcome.struck, outcome.left_out = load.asked, chaos.done, []
        await _strike(plan, load, chaos, outcome, lambda start: _show(progress, bar, load, chaos, start))
        outcome.leaks += await _held(client, chaos)
    finally:
        chaos.release()
        await bus.abort()


async def _strike(
    plan: ChaosPlan, load: Load, chaos: Chaos, outcome: Outcome, show: Callable[[float], Awaitable[None]]
) -> None:
    """The load with strikes; it goes on after its time until all strikes are done and everybody has recovered."""
    start = time.monotonic()
    is_over = False

    async def strike() -> None:
        nonlocal is_over
        late = start + plan.seconds + OVERDUE_SECONDS + SETTLE_SECONDS
        try:
            while not is_over:
                now = time.monotonic()
                chaos.tick(now, start)
                overdue = [s for s in chaos.waiting if now > start + s.at + OVERDUE_SECONDS]
                outcome.left_out += overdue
                chaos.waiting = [s for s in chaos.waiting if s not in overdue]
                is_over = now >= start + plan.seconds and (chaos.settled or now > late)
                await asyncio.sleep(TICK_SECONDS)
        finally:
            is_over = True  # whatever happened: nobody else ends the load

    outcome.window = (start, start)
    try:
        async with _doing(strike), _doing(lambda: show(start)):
            await load.stream(plan.streams, lambda: is_over)
    finally:
        outcome.window = (start, min(time.monotonic(), max([start + plan.seconds, *(a.sent for a in load.asked)])))
        outcome.unwell = [p.child.name for p in chaos.processes if p.open is not None]


async def _show(progress: Progress, bar: Any, load: Load, chaos: Chaos, start: float) -> None:
    while True:
        failed, wrong = sum(bool(a.failure) for a in load.asked), sum(bool(a.wrong) for a in load.asked)
        note = f"{len(load.asked)} answers, {len(chaos.done)} strikes, {failed} failed, {wrong} wrong"
        progress.update(bar, completed=time.monotonic() - start, note=note)
        await asyncio.sleep(0.2)


@contextlib.asynccontextmanager
async def _doing(work: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """`work` beside the block; what it raises is raised when the block ends."""

    async def do() -> None:
        await work()

    task = asyncio.create_task(do(), name="beside")
    try:
        yield
    finally:
        if not task.done():
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _until(predicate: Callable[[], bool], seconds: float) -> bool:
    """Whether `predicate` came true within `seconds`."""
    deadline = time.monotonic() + seconds
    while not predicate():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(TICK_SECONDS)
    return True


async def _held(client: Client, chaos: Chaos) -> list[str]:
    """What routers and the gateway still hold, though nobody asks any more."""
    ended = time.monotonic()

    def held(status: Status) -> bool:
        return bool(status.running or status.waiting or status.kv_usage)

    def fresh() -> bool:
        """Whether every router has said since the load ended that it holds nothing."""
        routers = [p for p in chaos.processes if p.kind == "router"]
        return all(p.status is not None and p.heard > ended and not held(p.status) for p in routers)

    found = []
    if not await _until(fresh, TIDY_SECONDS):
        for process in chaos.processes:
            s = process.status
            if process.kind == "router" and s is not None and (held(s) or process.heard <= ended):
                what = f"{s.running} running, {s.waiting} waiting, {s.kv_usage:.1%} of the KV blocks"
                found.append(f"{process.child.name}: {what}{'' if process.heard > ended else ', silent since'}")
    try:
        async with asyncio.timeout(TIDY_SECONDS):
            status, answer = await client.json("GET", "/load")
    except (TransferError, TimeoutError) as error:
        return [*found, f"gateway: /load is not answered: {error}"]
    if isinstance(answer, Refusal) or answer.get("running") or answer.get("waiting"):
        found.append(f"gateway: /load says {status} {answer}")
    return found


def _ended_badly(stack: Stack, descendants: list[psutil.Process]) -> list[str]:
    """Services that did not end by SIGTERM with exit code 0, and processes that are still there."""
    found = []
    for child in stack.children:
        code = child.process.returncode if child.process is not None else None
        # Not those that the end met while they were starting; nats-server ends with 1 on SIGTERM.
        if code not in (0, -signal.SIGTERM) and not (child.name == "nats-server" and code == 1):
            found.append(f"{child.name} ended with code {code}")
    for process in descendants:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"process {process.pid} ({process.name()}) is left")
    return found
