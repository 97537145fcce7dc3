"""SCALING_EXECUTOR=compose against a real Docker engine, on a project of containers that start and end at once."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from services.monitor.executors.compose import ComposeExecutor
from services.nats_server import binary
from shared.errors import MoeError
from tests.compose.project import docker, succeeded

COMPOSE = """
name: openmoe-scaling-test
services:
  expert: &server
    image: openmoe-scaling-test
    build: .
    stop_grace_period: 5s
  router: *server
"""
DOCKERFILE = """
FROM scratch
COPY server /server
ENTRYPOINT ["/server"]
"""


@pytest_asyncio.fixture(loop_scope="session")
async def executor(engine: None, tmp_path: Path) -> AsyncIterator[ComposeExecutor]:
    """Of a project with one container of each service; the server is any static program that ends at SIGTERM."""
    shutil.copy2(binary(), tmp_path / "server")
    (tmp_path / "Dockerfile").write_text(DOCKERFILE)
    (tmp_path / "compose.yaml").write_text(COMPOSE)
    try:
        await succeeded("docker", "compose", "up", "--build", "--detach", folder=tmp_path)
        yield ComposeExecutor({"expert": "expert", "router": "router"}, tmp_path)
    finally:
        await docker("compose", "down", "--rmi", "local", "--volumes", folder=tmp_path)


async def test_containers_come_and_go_and_the_others_stay(executor: ComposeExecutor, tmp_path: Path) -> None:
    assert await executor.counts() == {"expert": 1, "router": 1}
    before = await succeeded("docker", "compose", "ps", "--quiet", folder=tmp_path)
    await executor.scale("expert", 3, "load")
    assert await executor.counts() == {"expert": 3, "router": 1}
    await executor.scale("expert", 1, "no load")
    assert await executor.counts() == {"expert": 1, "router": 1}
    after = await succeeded("docker", "compose", "ps", "--quiet", folder=tmp_path)
    assert set(after.split()) == set(before.split()), "a container was made anew"


async def test_a_service_that_is_not_there_is_a_typed_error(executor: ComposeExecutor, tmp_path: Path) -> None:
    wrong = ComposeExecutor({"expert": "nobody"}, tmp_path)
    with pytest.raises(MoeError, match="nobody"):
        await wrong.scale("expert", 2, "load")
