"""`openmoe up` for the time of a measurement."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

READY_SECONDS = 300
STOP_SECONDS = 30


@contextlib.asynccontextmanager
async def stack(*arguments: str, log: Path = Path(os.devnull), **environment: str) -> AsyncIterator[str]:
    """Start a stack on a free port; gives its URL once it has produced a completion, and stops it after.

    Args:
        arguments: of `openmoe up`.
        log: the file that the services' logs go to.
        environment: settings.

    """
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.cli", "up", "--port", "0", *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=output,
            env={**os.environ, "SCALING_EXECUTOR": "none", **environment},  # what is measured stays as it is
        )
    assert process.stdout is not None  # noqa: S101 - asked for above
    try:
        async with asyncio.timeout(READY_SECONDS):
            while not (line := await process.stdout.readline()).startswith(b"ready "):
                if not line:
                    raise SystemExit("openmoe up ended before it was ready; run it by itself to see why")
        yield line.split()[1].decode()
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
        async with asyncio.timeout(STOP_SECONDS):
            await process.wait()


@contextlib.asynccontextmanager
async def beside(work: Callable[[], Awaitable[object]], every_seconds: float) -> AsyncIterator[None]:
    """Do `work` again and again, with a pause of `every_seconds`, as long as the block lasts."""

    async def again() -> None:
        while True:
            await work()
            await asyncio.sleep(every_seconds)

    task = asyncio.create_task(again(), name="beside")
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
