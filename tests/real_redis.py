"""A real redis-server for tests."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from tests.running import Running, answers, start, wait_until

needs_redis = pytest.mark.skipif(not shutil.which("redis-server"), reason="redis-server is not installed")


@dataclasses.dataclass
class RealRedis:
    """A redis-server that can be stopped and started again on its port."""

    folder: Path
    port: int
    running: Running | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    async def start(self) -> None:
        command = ("redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "")
        self.running = await start(self.folder, "redis", *command, "--dir", str(self.folder))
        await wait_until(lambda: answers(self.port), "Redis to listen")

    async def stop(self) -> None:
        if self.running is not None:
            await self.running.kill()
