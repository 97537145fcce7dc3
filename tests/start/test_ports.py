"""Several stacks on one machine do not end up on one bus."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx

from services.nats_server import free_port
from tests.oracle import make_checkpoint
from tests.running import running_nats, running_stack


async def test_the_usual_port_is_left_to_whoever_has_it(tmp_path: Path) -> None:
    with_the_port = await asyncio.start_server(lambda _r, w: w.close(), "127.0.0.1", free_port())
    port = with_the_port.sockets[0].getsockname()[1]
    assert free_port(port) != port
    with_the_port.close()
    await with_the_port.wait_closed()


async def test_two_stacks_on_one_machine_have_a_bus_each(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "tiny", "mixtral")
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    async with (
        running_nats(tmp_path),
        running_stack(folders[0], "--model", str(path)) as one,
        running_stack(folders[1], "--model", str(path)) as two,
        httpx.AsyncClient(timeout=60) as http,
    ):
        seen = [(await http.get(f"{stack.url}/health")).json()["parts"] for stack in (one, two)]
    assert [len(parts["experts"]["instances"]) for parts in seen] == [2, 2]
    assert seen[0]["router"]["instances"] != seen[1]["router"]["instances"]
    buses = [next(ln for ln in s.log.read_text().splitlines() if ln.startswith("nats-server ")) for s in (one, two)]
    assert buses[0] != buses[1]
