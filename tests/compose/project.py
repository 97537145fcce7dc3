"""One compose project under test: its commands, its containers, and what they log."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

from services.nats_server import free_port

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SERVICES = ("gateway", "router", "expert", "monitor")
COMMAND_SECONDS = 300


async def docker(
    *arguments: str, seconds: float = COMMAND_SECONDS, folder: Path | None = None, **env: str
) -> tuple[int, str]:
    """`docker …`: its exit code, and both outputs together."""
    return await command("docker", *arguments, seconds=seconds, folder=folder, **env)


async def command(
    *line: str, seconds: float = COMMAND_SECONDS, folder: Path | None = None, **env: str
) -> tuple[int, str]:
    """Run `line` for at most `seconds`: its exit code, and both outputs together."""
    process = await asyncio.create_subprocess_exec(
        *line,
        cwd=folder,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, **env},
    )
    try:
        async with asyncio.timeout(seconds):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        output, _ = await process.communicate()
        raise AssertionError(f"{' '.join(line)} took more than {seconds:g} s: {output.decode()[-4000:]}") from None
    assert process.returncode is not None
    return process.returncode, output.decode(errors="replace")


async def succeeded(*line: str, seconds: float = COMMAND_SECONDS, folder: Path | None = None, **env: str) -> str:
    """What `line`, which must end with exit code 0, printed."""
    code, said = await command(*line, seconds=seconds, folder=folder, **env)
    assert code == 0, f"{' '.join(line)} ended with code {code}: {said[-4000:]}"
    return said


class Project:
    """The stack in `folder` under a project name and a port of its own."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder = folder
        self.name = f"openmoe-test-{os.urandom(3).hex()}"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        monitor_port = free_port()
        self.monitor_url = f"http://127.0.0.1:{monitor_port}"
        self.settings = {
            "PORT": str(self.port),
            "MONITOR_PORT": str(monitor_port),
            "OPENMOE_TAG": "test",
            "COMPOSE_ANSI": "never",
            **settings,
        }

    async def attempt(self, *arguments: str, seconds: float = COMMAND_SECONDS, **env: str) -> tuple[int, str]:
        """`docker compose …` in this project: exit code and output."""
        line = ("compose", "--project-name", self.name, *arguments)
        return await docker(*line, seconds=seconds, folder=self.folder, **{**self.settings, **env})

    async def compose(self, *arguments: str, seconds: float = COMMAND_SECONDS, **env: str) -> str:
        """`docker compose …`, which must end with exit code 0."""
        code, said = await self.attempt(*arguments, seconds=seconds, **env)
        assert code == 0, f"docker compose {' '.join(arguments)} ended with code {code}: {said[-4000:]}"
        return said

    async def scale(self, **replicas: int) -> None:
        """`docker compose up -d --scale …`, until the new ones are healthy and the old ones have ended."""
        scales = [part for service, count in replicas.items() for part in ("--scale", f"{service}={count}")]
        await self.compose("up", "-d", "--no-recreate", "--wait", *scales)

    async def logs(self, *arguments: str) -> str:
        # Compose 2.26 writes "erase line" before each line, whatever it was told about colours.
        return (await self.attempt("logs", "--no-color", *arguments))[1].replace("\x1b[2K", "")

    async def events(self, service: str) -> list[dict[str, Any]]:
        """What a service's containers logged; each line must be one JSON object."""
        said = await self.logs("--no-log-prefix", service)
        return [json.loads(line) for line in said.splitlines() if line.strip()]

    async def containers(self, service: str) -> list[str]:
        return (await self.compose("ps", "--quiet", service)).split()

    async def start_seconds(self) -> dict[str, float]:
        """Per service: seconds from its container's start to its line that says ready."""
        result = {}
        for service in SERVICES[:3]:
            container = (await self.containers(service))[0]
            started = await succeeded("docker", "inspect", "--format", "{{.State.StartedAt}}", container)
            ready = [e["timestamp"] for e in await self.events(service) if e["event"] == f"{service}.ready"]
            moments = [dt.datetime.fromisoformat(text.strip()[:26].rstrip("Z")) for text in (started, min(ready))]
            result[service] = (moments[1] - moments[0]).total_seconds()
        return result

    async def image_megabytes(self) -> float:
        return int(await succeeded("docker", "image", "inspect", "--format", "{{.Size}}", "openmoe:test")) / 1e6

    async def prometheus(self, *queries: str) -> list[list[dict[str, Any]]]:
        """The results of instant queries, asked from within, as Prometheus publishes no port."""
        script = (
            "import json, sys, urllib.parse, urllib.request as r\n"
            "for query in sys.argv[1:]:\n"
            "  url = 'http://prometheus:9090/api/v1/query?' + urllib.parse.urlencode({'query': query})\n"
            "  print(r.urlopen(url, timeout=10).read().decode())"
        )
        said = await self.compose("exec", "-T", "monitor", "python", "-c", script, *queries)
        return [json.loads(line)["data"]["result"] for line in said.splitlines()]

    def http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=60, trust_env=False)

    @contextlib.asynccontextmanager
    async def under_load(self, rate: float = 4) -> AsyncIterator[asyncio.Event]:
        """`openmoe load` while the body runs, and a little longer; no request may fail. Yields once it flows."""
        line = (sys.executable, "-m", "services.cli", "load", self.url, "--rate", f"{rate:g}", "--max-tokens", "8")
        done = asyncio.Event()

        async def rounds() -> None:
            while True:
                stop = done.is_set()
                await succeeded(*line, "--duration", "5" if stop else "10", folder=REPOSITORY)
                if stop:
                    return

        async with asyncio.TaskGroup() as group:
            group.create_task(rounds())
            try:
                yield done
            finally:
                done.set()

    async def down(self) -> None:
        await self.compose("down", "--volumes", "--timeout", "60")

    async def leftovers(self) -> list[str]:
        """Containers, volumes and networks that still carry the project's label."""
        label = f"label=com.docker.compose.project={self.name}"
        found = []
        for what in (("ps", "--all"), ("volume", "ls"), ("network", "ls")):
            found += (await succeeded("docker", *what, "--quiet", "--filter", label)).split()
        return found
