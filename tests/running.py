"""Real processes for tests: nats-server, single services, and whole stacks; with waiting that has a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import inspect
import itertools
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from services.nats_server import binary, free_port, write_config
from shared.bus import Bus
from shared.settings import SECRETS, ExpertSettings, GatewaySettings, MonitorSettings, RouterSettings
from shared.status import Fleet

READY_SECONDS = 90
STOP_SECONDS = 30
POLL_SECONDS = 0.02
LOG_CHARACTERS = 4000
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_numbers = itertools.count()
_SETTINGS = {
    *(f.upper() for s in (ExpertSettings, GatewaySettings, MonitorSettings, RouterSettings) for f in s.model_fields),
    *(f"{name}_FILE" for name in SECRETS),
}


async def wait_until(predicate: Callable[[], object], what: str, seconds: float = READY_SECONDS) -> None:
    """Return as soon as `predicate`, which may be a coroutine function, says something true; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        result = predicate()
        if inspect.isawaitable(result):
            result = await result
        if result:
            return
        assert time.monotonic() < deadline, f"waited {seconds:g} s for this: {what}"
        await asyncio.sleep(POLL_SECONDS)


def environment(**settings: str) -> dict[str, str]:
    """This process' environment with no settings of ours but `settings`; torch gets one thread, the page a free port."""
    inherited = {name: value for name, value in os.environ.items() if name.upper() not in _SETTINGS}
    return {**inherited, "OMP_NUM_THREADS": "1", "TORCH_THREADS": "1", "MONITOR_PORT": "0", **settings}


def die_with_parent() -> None:
    """In the child: end when the tests do, even if they are killed and can stop nobody."""
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass(frozen=True)
class Running:
    """One process that a test started; what it says is in `log`."""

    name: str
    process: asyncio.subprocess.Process
    log: Path

    def said(self) -> str:
        return f"{self.name} said:\n{self.log.read_text(errors='replace')[-LOG_CHARACTERS:]}"

    async def ended(self, seconds: float = STOP_SECONDS) -> int:
        """Its exit code, once it has ended."""
        try:
            async with asyncio.timeout(seconds):
                return await self.process.wait()
        except TimeoutError:
            raise AssertionError(f"{self.name} did not end within {seconds:g} s; {self.said()}") from None

    async def stop(self) -> None:
        """SIGTERM; it must end with exit code 0."""
        if self.process.returncode is None:
            self.process.terminate()
        code = await self.ended()
        assert code == 0, f"{self.name} ended with code {code}; {self.said()}"

    async def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()


async def start(folder: Path, name: str, *command: str, **settings: str) -> Running:
    """Run `command`, its output in a file of `folder`."""
    log = folder / f"{name}-{next(_numbers)}.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment(**settings),
            process_group=0,
            preexec_fn=die_with_parent,
        )
    return Running(name, process, log)


async def start_service(folder: Path, service: str, **settings: str) -> Running:
    """`python -m services.<service>`."""
    return await start(folder, service, sys.executable, "-m", f"services.{service}", **settings)


@contextlib.asynccontextmanager
async def running_nats(folder: Path) -> AsyncIterator[str]:
    """A nats-server of our own; its URL."""
    port = free_port()
    server = await start(folder, "nats-server", binary(), "--config", str(write_config(folder, port)))
    try:
        await wait_until(lambda: answers(port), "nats-server to listen")
        yield f"nats://127.0.0.1:{port}"
    finally:
        if server.process.returncode is None:
            server.process.terminate()
        await server.ended()


async def answers(port: int) -> bool:
    """Whether somebody listens on the loopback interface's `port`."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


@dataclass(frozen=True)
class Watcher:
    """A connection to the bus, and everybody's status reports."""

    bus: Bus
    fleet: Fleet


@contextlib.asynccontextmanager
async def watching(nats_url: str) -> AsyncIterator[Watcher]:
    """Listen to the fleet on `nats_url`."""
    bus = await Bus.connect(nats_url, "test", f"test-{os.getpid()}-{next(_numbers)}")
    fleet = Fleet()
    try:
        await fleet.watch(bus)
        yield Watcher(bus, fleet)
    finally:
        await bus.abort()


@dataclass(frozen=True)
class Stack:
    url: str
    log: Path
    pid: int


def family(pid: int) -> list[psutil.Process]:
    """The descendants of process `pid`."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@contextlib.asynccontextmanager
async def running_stack(folder: Path, *arguments: str, **settings: str) -> AsyncIterator[Stack]:
    """`openmoe up` with these arguments; on leaving it must end with exit code 0 and leave nothing behind.

    It stays as large as it is, whatever the load, unless SCALING_EXECUTOR is given; empty, it is what `up` makes it.
    """
    log = folder / "up.log"
    command = [sys.executable, "-m", "services.cli", "up", "--port", "0", *arguments]
    with log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=stderr,
            env=environment(**{"SCALING_EXECUTOR": "none", **settings}),
            process_group=0,
            preexec_fn=die_with_parent,
        )
    running = Running("openmoe up", process, log)
    assert process.stdout is not None
    descendants: list[psutil.Process] = []
    try:
        line = ""
        try:
            async with asyncio.timeout(READY_SECONDS):
                while not line.startswith("ready "):
                    raw = await process.stdout.readline()
                    assert raw, f"it ended before it was ready; {running.said()}"
                    line = raw.decode()
        except TimeoutError:
            raise AssertionError(f"it was not ready within {READY_SECONDS} s; {running.said()}") from None
        yield Stack(line.split()[1], log, process.pid)
    finally:
        descendants = family(process.pid)
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
        try:
            code = await running.ended()
        finally:
            await running.kill()
    assert code == 0, running.said()
    left = [p for p in descendants if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not left, f"openmoe up left processes behind: {left}"
