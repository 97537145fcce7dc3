"""An event loop whose clock is simulated: it never waits, it jumps to the next timer. And processes that can be stopped.

All that runs on it runs in one thread, in an order that follows from the seed alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import heapq
import itertools
import time
from collections.abc import Callable, Coroutine, Iterator
from contextvars import Context, ContextVar, copy_context
from typing import Any

START = 1000.0
"""What the simulated monotonic clock shows first, in seconds."""
UNIX_START = 1_700_000_000.0

process: ContextVar[Process | None] = ContextVar("process", default=None)
"""Whose code is running; None: the world's own, the network's for example."""


class Process:
    """One simulated process: the tasks, timers and callbacks that were started by its code."""

    def __init__(self, loop: SimulatedLoop, name: str) -> None:
        self.name = name
        self.stopped = False
        self.dead = False
        self.compute_seconds: Callable[[], float] = lambda: 0.0
        """How long a computation takes here."""
        self.load_seconds: Callable[[], float] = lambda: 0.0
        self.context: Context = copy_context()
        self.context.run(process.set, self)
        self._loop = loop
        self._held: list[asyncio.Handle] = []
        self._tasks: dict[asyncio.Task[Any], None] = {}

    def start(self, main: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run `main` as this process' code."""
        return self.context.copy().run(self._loop.create_task, main, name=name)

    def add(self, task: asyncio.Task[Any]) -> None:
        self._tasks[task] = None
        task.add_done_callback(self._remove, context=NOBODY)

    def _remove(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)

    def hold(self, handle: asyncio.Handle) -> None:
        self._held.append(handle)

    @property
    def tasks(self) -> list[asyncio.Task[Any]]:
        return list(self._tasks)

    def stop(self) -> None:
        """SIGSTOP: nothing of it runs; what arrives, and timers that come due, wait."""
        self.stopped = True

    def resume(self) -> None:
        """SIGCONT."""
        self.stopped = False
        held, self._held = self._held, []
        self._loop.run_again(held)

    async def kill(self) -> None:
        """End every task. What they do on their way out reaches nobody: the connection went first."""
        self.dead = True
        self.resume()
        for _ in range(100):
            for task in self.tasks:
                task.cancel()
            if not self._tasks:
                return
            await asyncio.sleep(0)
        raise AssertionError(f"{self.name}: these tasks cannot be cancelled: {self.tasks}")


NOBODY = Context()
"""The context of the network's and the world's callbacks, which no stopped process holds up."""


class SimulatedLoop(asyncio.BaseEventLoop):
    """An event loop without files, threads or waiting. Timers of the same moment run in the order in which they were set."""

    def __init__(self) -> None:
        super().__init__()
        self._now = START
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._numbers = itertools.count()
        self.set_task_factory(_task)  # type: ignore[arg-type]

    def time(self) -> float:
        return self._now

    def run_again(self, handles: list[asyncio.Handle]) -> None:
        self._ready.extend(handles)  # type: ignore[attr-defined]

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._numbers), timer))
        return timer

    def _run_once(self) -> None:
        """What BaseEventLoop does, but that the clock jumps to the next timer when nothing else is to be done."""
        ready, timers = self._ready, self._timers  # type: ignore[attr-defined]
        if not ready:
            while timers and timers[0][2].cancelled():
                heapq.heappop(timers)
            if not timers:
                raise RuntimeError("deadlock: no timer is set and nothing is under way, yet something is waited for")
            self._now = max(self._now, timers[0][0])
        while timers and timers[0][0] <= self._now:
            ready.append(heapq.heappop(timers)[2])
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            owner = handle._context.get(process)
            if owner is not None and owner.stopped:
                owner.hold(handle)
                continue
            try:
                handle._context.run(handle._callback, *handle._args)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                self.call_exception_handler({"message": f"exception in {handle!r}", "exception": error})


def _task(
    loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any], context: Context | None = None
) -> asyncio.Task[Any]:
    owner = process.get() if context is None else context.get(process)
    task = asyncio.Task(work, loop=loop, context=context)
    if owner is not None:
        owner.add(task)
    return task


@contextlib.contextmanager
def simulated_time(loop: SimulatedLoop) -> Iterator[None]:
    """Let the standard library's clocks show the loop's time; collect no garbage, whose order is not the seed's."""
    names = ("monotonic", "perf_counter", "time")
    before = {name: getattr(time, name) for name in names}
    collecting = gc.isenabled()
    gc.disable()
    time.monotonic = time.perf_counter = loop.time
    time.time = lambda: UNIX_START + loop.time()
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(time, name, function)
        if collecting:
            gc.enable()
