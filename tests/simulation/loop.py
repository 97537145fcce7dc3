"""An event loop whose clock is simulated: it never waits, it jumps to the next timer. And processes that can be stopped.

All that runs on it runs in one thread, in an order that follows from the seed alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import heapq
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


class _Handle(asyncio.Handle):
    __slots__ = ()

    def _run(self) -> None:
        owner = self._context.get(process)  # type: ignore[attr-defined]
        if owner is not None and owner.stopped:
            owner.hold(self)
        else:
            super()._run()


class _TimerHandle(asyncio.TimerHandle):
    __slots__ = ()

    def _run(self) -> None:
        owner = self._context.get(process)  # type: ignore[attr-defined]
        if owner is not None and owner.stopped:
            owner.hold(self)
        else:
            super()._run()


NOBODY = Context()
"""The context of the network's and the world's callbacks, which no stopped process holds up."""


class _Jump:
    """Stands where the loop asks its selector to wait for files and for the next timer."""

    def __init__(self, loop: SimulatedLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("deadlock: no timer is set and nothing is under way, yet something is waited for")
        if timeout > 0:
            self._loop.jump()
        return []


class SimulatedLoop(asyncio.BaseEventLoop):
    """An event loop without files, threads or waiting."""

    def __init__(self) -> None:
        super().__init__()
        self._now = START
        self._selector = _Jump(self)
        self._clock_resolution = 1e-9
        self.set_task_factory(_task)  # type: ignore[arg-type]

    def time(self) -> float:
        return self._now

    def jump(self) -> None:
        """Move the clock to the next timer."""
        self._now = max(self._now, self._scheduled[0]._when)  # type: ignore[attr-defined]

    def run_again(self, handles: list[asyncio.Handle]) -> None:
        self._ready.extend(handles)  # type: ignore[attr-defined]

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        timer = _TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._scheduled, timer)  # type: ignore[attr-defined]
        timer._scheduled = True  # type: ignore[attr-defined]
        return timer

    def _call_soon(self, callback: Callable[..., object], args: Any, context: Context | None) -> asyncio.Handle:
        handle = _Handle(callback, args, self, context)
        self._ready.append(handle)  # type: ignore[attr-defined]
        return handle

    def _process_events(self, event_list: list[Any]) -> None:
        """Nothing: there are no files."""

    def _write_to_self(self) -> None:
        """Nothing: there are no threads to be woken by."""


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
