"""What the command `openmoe chaos` does around a run: options, the log, the tables, the exit code."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
from pathlib import Path
from typing import TextIO

import structlog
from rich.console import Console

from services import chaos_report
from services.chaos import ChaosPlan, Outcome, run
from services.chaos_schedule import KINDS, Kind
from shared.errors import StartError


def targets(text: str) -> tuple[Kind, ...]:
    """The kinds of a list like expert,router.

    Raises:
        StartError: one of them is none.

    """
    given = {part.strip() for part in text.split(",") if part.strip()}
    unknown = sorted(given - set(KINDS))
    if unknown or not given:
        raise StartError(f"--targets {text}: choose from {','.join(KINDS)}")
    return tuple(kind for kind in KINDS if kind in given)


def _open(path: Path, option: str) -> TextIO:
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise StartError(f"{option} {path}: {error.strerror or error}") from None


def command(plan: ChaosPlan, json_file: Path | None, log: Path | None, *, markdown: bool) -> int:
    """Run it and print what came of it; the exit code.

    Raises:
        StartError: it could not start, or a file cannot be written.

    """
    plan.check()
    if json_file is not None:
        _open(json_file, "--json").close()
    path = log
    if path is None:
        handle, name = tempfile.mkstemp(prefix="openmoe-chaos-", suffix=".log")
        os.close(handle)
        path = Path(name)
    passed = False
    try:
        with _open(path, "--log") as lines:
            outcome = asyncio.run(_ending(plan, lines))
        found = chaos_report.report(outcome)
        passed = not found["reasons"]
        if json_file is not None:
            json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        console = Console()
        if markdown:
            console.print(chaos_report.markdown(found), end="", markup=False, highlight=False, soft_wrap=True)
        else:
            for table in chaos_report.tables(found):
                console.print(table)
            for line in chaos_report.notes(found):
                console.print(line, markup=False, highlight=False, soft_wrap=True, style="red")
    finally:
        if log is None and passed:
            path.unlink(missing_ok=True)
        elif log is None:
            Console(stderr=True).print(f"the services' log: {path}", soft_wrap=True, highlight=False)
    return 130 if outcome.interrupted else 0 if passed else 1


async def _ending(plan: ChaosPlan, lines: TextIO) -> Outcome:
    """The run; SIGTERM ends it as Ctrl-C does."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(lines))  # our own connection is struck as well
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - we run in one
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await run(plan, Console(stderr=True), lines)
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
