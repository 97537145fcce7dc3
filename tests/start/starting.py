"""Starts a service or a whole stack that must refuse, and reads the one line that says why."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.running import Running, start, start_service

REFUSED = 2


async def _begin(folder: Path, what: str, settings: dict[str, str]) -> Running:
    quiet = {"PORT": "0", "METRICS_PORT": "0", "LOG_LEVEL": "WARNING", **settings}
    if what == "up":
        return await start(folder, "up", sys.executable, "-m", "services.cli", "up", **quiet)
    return await start_service(folder, what, **quiet)


async def refusal(folder: Path, what: str, settings: dict[str, str], seconds: float = 60) -> str:
    """The one line that says why `what` does not start; the process must end with exit code 2.

    Args:
        folder: where its log goes.
        what: a service, or "up" for the whole stack, which shows its children's logs too.
        settings: on top of a free port for everything.
        seconds: the longest time that it may take.

    """
    running = await _begin(folder, what, settings)
    try:
        code = await running.ended(seconds)
    finally:
        await running.kill()
    assert code == REFUSED, f"{what} ended with code {code}; {running.said()}"
    said = running.log.read_text()
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, f"{what} does not say why in one line; {running.said()}"
    assert "Traceback" not in said
    return lines[0]
