"""A gateway, routers and workers as single processes, which nobody restarts; and streams that read from them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from services.nats_server import free_port
from shared.checkpoint import Checkpoint
from shared.settings import DEMO_MODEL
from shared.status import Fleet, Status
from tests.running import Running, start_service, wait_until

Text = tuple[str, int]
"""A stream's text, and how many tokens it had."""


@dataclass
class Processes:
    """What serves one deployment of the demo model, in float32; S = 2."""

    folder: Path
    name: str
    deployment: str
    url: str
    settings: dict[str, str]
    running: dict[str, Running]

    async def start(self, service: str, number: int = 0, **settings: str) -> str:
        """Start one process; its instance's name."""
        instance = f"{service}-{self.name}-{number}"
        self.running[instance] = await start_service(
            self.folder, service, **{**self.settings, "INSTANCE": instance, **settings}
        )
        return instance

    def reports(self, fleet: Fleet, service: str) -> list[Status]:
        return [s for s in fleet.live(service) if s.deployment == self.deployment]

    def ready(self, fleet: Fleet, service: str) -> list[Status]:
        return [s for s in self.reports(fleet, service) if s.state == "ready"]

    async def all_ready(self, fleet: Fleet) -> None:
        """Wait until everything that runs says that it is ready."""

        def everybody() -> bool:
            for each in self.running.values():
                assert each.process.returncode is None, f"it ended; {each.said()}"
            ready = {s.instance for service in ("gateway", "router", "expert") for s in self.ready(fleet, service)}
            return ready >= set(self.running)

        await wait_until(everybody, f"all of {self.name} to be ready")

        async def healthy() -> bool:
            async with httpx.AsyncClient(base_url=self.url, trust_env=False) as client:
                return (await client.get("/health")).status_code == 200

        await wait_until(healthy, f"{self.name}'s gateway to say so")

    def only_holder(self, fleet: Fleet, shard: int) -> str:
        (holder,) = [s.instance for s in self.ready(fleet, "expert") if shard in s.shards]
        return holder

    def said(self, instance: str, event: str) -> list[dict[str, Any]]:
        """The lines of that event in a process' log."""
        lines = self.running[instance].log.read_text(errors="replace").splitlines()
        found = [json.loads(line) for line in lines if line.startswith("{") and f'"{event}"' in line]
        return [line for line in found if line.get("event") == event]

    async def end(self) -> None:
        """SIGTERM to all that still run, in the order of a request's path; each must end with exit code 0."""
        for service in ("gateway", "router", "expert"):
            await asyncio.gather(
                *(r.stop() for i, r in self.running.items() if i.startswith(service) and r.process.returncode is None)
            )


@contextlib.asynccontextmanager
async def processes(folder: Path, nats_url: str, name: str, workers: int = 2) -> AsyncIterator[Processes]:
    """One gateway, one router, and workers that share two shards; they may not be ready yet."""
    port = free_port()
    settings = {
        "ENV": "staging",  # logs as JSON
        "MODEL": str(DEMO_MODEL),
        "SERVED_MODEL_NAME": name,
        "NATS_URL": nats_url,
        "DTYPE": "float32",
        "EXPERT_SHARDS": "2",
        "WORKERS": str(workers),
        "PORT": str(port),
        "KV_CACHE_MB": "32",
    }
    deployment = Checkpoint.open(DEMO_MODEL).deployment(name)
    made = Processes(folder, name, deployment, f"http://127.0.0.1:{port}", settings, {})
    try:
        for number in range(workers):
            await made.start("expert", number)
        await made.start("router")
        await made.start("gateway")
        yield made
        await made.end()
    finally:
        await asyncio.gather(*(running.kill() for running in made.running.values()))


class Stream:
    """One streamed completion."""

    def __init__(self, url: str, prompt: str, max_tokens: int = 300) -> None:
        self.text = ""
        self.pieces = 0
        self._url = url
        self._body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}

    async def read(self) -> Text:
        """Read it to its end, which must be a good one."""
        body = {**self._body, "stream_options": {"include_usage": True}}
        tokens, done = 0, False
        async with (
            httpx.AsyncClient(base_url=self._url, timeout=120, trust_env=False) as client,
            client.stream("POST", "/v1/completions", json=body) as answer,
        ):
            assert answer.status_code == 200, await answer.aread()
            async for line in answer.aiter_lines():
                done = done or line == "data: [DONE]"
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, event
                    self.text += "".join(choice["text"] for choice in event["choices"])
                    self.pieces += 1
                    tokens = event["usage"]["completion_tokens"] if event.get("usage") else tokens
        assert done, "the stream ended without [DONE]"
        return self.text, tokens


async def texts(url: str, prompts: list[str]) -> list[Text]:
    return await asyncio.gather(*(Stream(url, prompt).read() for prompt in prompts))
