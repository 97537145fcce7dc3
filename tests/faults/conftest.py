"""One fleet for all fault tests; each leaves it whole."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import psutil
import pytest
import pytest_asyncio

from tests.faults.fleet import FaultFleet, fault_fleet
from tests.running import wait_until

TIDY_SECONDS = 5.0


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def whole_fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[FaultFleet]:
    async with fault_fleet(tmp_path_factory.mktemp("faults")) as fleet:
        yield fleet


def _is_the_tests(task: asyncio.Task[object]) -> bool:
    """Not one of the proxies' connections, or of nats-py, which makes new ones for each connection."""
    code = getattr(task.get_coro(), "cr_code", None)
    return not task.get_name().startswith("proxy") and "/nats/" not in (code.co_filename if code else "")


@pytest_asyncio.fixture(autouse=True, loop_scope="session")
async def _nothing_is_left_behind(request: pytest.FixtureRequest) -> AsyncIterator[None]:
    """As the fixture of that name for all tests; but a test of the fleet may start processes and connections anew.

    `fleet` looks after those processes.
    """
    of_fleet = "whole_fleet" in request.fixturenames
    tasks, children = asyncio.all_tasks(), set(psutil.Process().children())
    yield

    def left() -> list[object]:
        new = asyncio.all_tasks() - tasks - {asyncio.current_task()}
        found: list[object] = [t for t in new if not t.done() and (_is_the_tests(t) or not of_fleet)]
        return found if of_fleet else [*found, *(set(psutil.Process().children()) - children)]

    with contextlib.suppress(AssertionError):
        await wait_until(lambda: not left(), "the test's tasks and processes to end", TIDY_SECONDS)
    assert not left(), "the test left tasks or processes behind"


@pytest_asyncio.fixture(loop_scope="session")
async def fleet(whole_fleet: FaultFleet) -> AsyncIterator[FaultFleet]:
    """The fleet; what a failed test left stopped, cut off or dead is mended for the next."""
    others = set(psutil.Process().children()) - whole_fleet.processes()
    try:
        yield whole_fleet
    finally:
        await whole_fleet.mend()
    assert set(psutil.Process().children()) - whole_fleet.processes() <= others, "the test left processes behind"
