"""A running stack of real processes, for tests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

READY_SECONDS = 90


@dataclass(frozen=True)
class Stack:
    url: str
    log: Path


@contextlib.asynccontextmanager
async def running_stack(folder: Path, *arguments: str, **environment: str) -> AsyncIterator[Stack]:
    """`openmoe up` with these arguments; on leaving it must end with exit code 0 and leave nothing behind."""
    log = folder / "up.log"
    command = [sys.executable, "-m", "services.cli", "up", "--port", "0", *arguments]
    with log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdout=asyncio.subprocess.PIPE,
            stderr=stderr,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        assert process.stdout is not None
        try:
            line = ""
            async with asyncio.timeout(READY_SECONDS):
                while not line.startswith("ready "):
                    raw = await process.stdout.readline()
                    assert raw, f"openmoe up ended before it was ready:\n{log.read_text()[-4000:]}"
                    line = raw.decode()
            yield Stack(line.split()[1], log)
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGINT)
            async with asyncio.timeout(30):
                code = await process.wait()
    assert code == 0, log.read_text()[-4000:]
