"""One fleet for all fault tests; each leaves it whole."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.faults.fleet import FaultFleet, fault_fleet


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def whole_fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[FaultFleet]:
    async with fault_fleet(tmp_path_factory.mktemp("faults")) as fleet:
        yield fleet


@pytest_asyncio.fixture(loop_scope="session")
async def fleet(whole_fleet: FaultFleet) -> AsyncIterator[FaultFleet]:
    """The fleet; what a failed test left stopped, cut off or dead is mended for the next."""
    try:
        yield whole_fleet
    finally:
        await whole_fleet.mend()
