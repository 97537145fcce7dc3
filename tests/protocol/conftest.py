"""A stack on a bus of its own: the client takes the first deployment that it hears of."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from tests.running import running_nats, running_stack


@dataclass(frozen=True)
class OwnBus:
    """The demo model, two shards on two workers, and nothing else on the bus."""

    url: str
    nats_url: str


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def own_bus(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[OwnBus]:
    async with (
        running_nats(tmp_path_factory.mktemp("protocol-nats")) as nats_url,
        running_stack(tmp_path_factory.mktemp("protocol-stack"), NATS_URL=nats_url) as stack,
    ):
        yield OwnBus(stack.url, nats_url)
