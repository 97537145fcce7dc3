"""A worker that holds half of the experts takes little more than half of their bytes, also while it loads them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench.worker_memory import measure


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
async def test_a_worker_holds_its_shard_only(tmp_path: Path) -> None:
    memory = await measure(tmp_path, gigabytes=1.0)
    assert memory.ok, str(memory)
