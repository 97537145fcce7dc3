"""SCALING_EXECUTOR=compose: `docker compose up --scale`, by the docker command where the project's folder is.

Compose sends SIGTERM to the containers that go, those with the highest numbers, and waits for `stop_grace_period`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from services.monitor.executors.base import failed, not_named
from services.monitor.utilisation import Service

COMMAND_SECONDS = 180.0
"""It waits until those that go have drained."""
KILL_SECONDS = 5.0
MOST_WORDS = 400


def scale_command(name: str, count: int) -> list[str]:
    """The command that has `count` containers of the service `name`, and leaves all others as they are."""
    options = ("--detach", "--no-recreate", "--no-deps", "--no-build")
    return ["docker", "compose", "up", *options, "--scale", f"{name}={count}", name]


def count_command(name: str) -> list[str]:
    """The command that prints a line for each running container of the service `name`."""
    return ["docker", "compose", "ps", "--quiet", "--status", "running", name]


class ComposeExecutor:
    """Runs docker."""

    acts = True

    def __init__(self, targets: Mapping[Service, str], directory: Path | None) -> None:
        """Scale `targets`, the names of compose's services, of the project in `directory` (None: the current one)."""
        self._targets = targets
        self._directory = directory

    async def counts(self) -> dict[Service, int]:
        found = {}
        for service, name in self._targets.items():
            found[service] = len((await self._run(count_command(name))).split())
        return found

    async def scale(self, service: Service, count: int, reason: str) -> str:
        del reason
        name = self._targets.get(service)
        if name is None:
            raise not_named(service)
        await self._run(scale_command(name, count))
        return f"docker compose has {count} of {name}"

    async def close(self) -> None:
        return

    async def _run(self, command: Sequence[str]) -> str:
        """What the command prints.

        Raises:
            MoeError: `scaling_failed`, with the end of what it says.

        """
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe, cwd=self._directory
            )
        except OSError as error:
            raise failed(
                f"{command[0]} cannot be run ({error.strerror}); install it, or mount it and its socket"
            ) from None
        try:
            async with asyncio.timeout(COMMAND_SECONDS):
                out, said = await process.communicate()
        except TimeoutError:
            raise failed(f"`{' '.join(command)}` took more than {COMMAND_SECONDS:g} s") from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(KILL_SECONDS):
                        await process.wait()
        if process.returncode:
            text = said.decode(errors="replace").strip()[-MOST_WORDS:]
            raise failed(f"`{' '.join(command)}` ended with code {process.returncode}: {text}")
        return out.decode(errors="replace")
