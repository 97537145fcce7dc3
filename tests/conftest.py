"""Fixtures for all tests, and the check around each that it leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, settings

from services.nats_server import free_port
from tests.real_redis import RealRedis
from tests.running import Stack, Watcher, running_nats, running_stack, wait_until, watching

TIDY_SECONDS = 5.0

# The same examples each time, however slow the machine: a test that fails must fail again.
settings.register_profile(
    "openmoe", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
settings.load_profile("openmoe")

# Before anything imports torch: its threads would spin against the processes that the tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def nats_url(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """One nats-server for all tests that speak to the bus."""
    async with running_nats(tmp_path_factory.mktemp("nats")) as url:
        yield url


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def watcher(nats_url: str) -> AsyncIterator[Watcher]:
    """A client of that server that sees every status report."""
    async with watching(nats_url) as client:
        yield client


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def stack(tmp_path_factory: pytest.TempPathFactory, nats_url: str) -> AsyncIterator[Stack]:
    """The demo model, served by real processes on the tests' nats-server."""
    async with running_stack(tmp_path_factory.mktemp("stack"), NATS_URL=nats_url) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def redis(tmp_path: Path) -> AsyncIterator[RealRedis]:
    """A redis-server of the test's own."""
    server = RealRedis(tmp_path, free_port())
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def _tasks() -> set[asyncio.Task[object]]:
    current = asyncio.current_task()
    return {task for task in asyncio.all_tasks() if task is not current and not task.done()}


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children())


@pytest_asyncio.fixture(autouse=True, loop_scope="session")
async def _nothing_is_left_behind() -> AsyncIterator[None]:
    """No task and no child process outlives its test; what wider fixtures own was there before it."""
    tasks, children = _tasks(), _children()
    yield

    def left() -> set[object]:
        return {*(_tasks() - tasks), *(_children() - children)}

    with contextlib.suppress(AssertionError):
        await wait_until(lambda: not left(), "the test's tasks and processes to end", TIDY_SECONDS)
    assert not left(), "the test left tasks or processes behind"
