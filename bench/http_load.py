"""Closed-loop HTTP load of one row per request, for bench.forward: one order per line in, one line of figures out.

Each connection sends its next request when the last answer is whole. Answers must be HTTP 200; one in CHECKED_EVERY is
compared with what it should be.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import msgspec
import numpy as np
import numpy.typing as npt
import uvloop

CHECKED_EVERY = 32
TOLERANCE = 1e-4
RAW = "application/octet-stream"
Rows = npt.NDArray[np.float32]


class Order(msgspec.Struct):
    """One measurement: `connections` at once against `port`, for `seconds` after `warm_up_seconds`."""

    port: int
    target: str
    media_type: str
    connections: int
    seconds: float
    warm_up_seconds: float = 1.0


class Answer(msgspec.Struct):
    """The msgpack answer, of which only the rows are looked at."""

    hidden_states: tuple[str, tuple[int, ...], bytes]


@dataclass
class Run:
    """What all connections share."""

    order: Order
    requests: list[bytes]
    expected: Rows
    """[R, H]"""
    measure_from: float
    measure_until: float
    seconds: list[float] = field(default_factory=list)
    checked: int = 0
    worst: float = 0.0
    open: int = 0
    sent: int = 0
    answered: int = 0
    failure: str = ""

    def check(self, row: int, body: bytes) -> None:
        data = body if self.order.media_type == RAW else msgspec.msgpack.decode(body, type=Answer).hidden_states[2]
        difference = float(np.abs(np.frombuffer(data, dtype="<f4") - self.expected[row]).max())
        self.checked += 1
        self.worst = max(self.worst, difference)
        if not difference <= TOLERANCE:
            self.failure = f"a row is wrong by {difference:g}"


class Connection(asyncio.Protocol):
    """One kept-alive connection."""

    def __init__(self, run: Run, ended: asyncio.Event) -> None:
        self._run = run
        self._ended = ended
        self._buffer = bytearray()
        self._row = 0
        self._start = 0.0
        self._whole = 0
        self._head = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        self._run.open += 1
        self._send()

    def _send(self) -> None:
        run = self._run
        self._row = run.sent % len(run.requests)
        run.sent += 1
        self._start = time.perf_counter()
        self._transport.write(run.requests[self._row])

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._whole:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self._buffer[:end]).lower()
            at = head.find(b"content-length:")
            if not head.startswith(b"http/1.1 200") or at < 0:
                self._run.failure = bytes(self._buffer[:400]).decode(errors="replace")
                self._transport.close()
                return
            self._head = end + 4
            self._whole = self._head + int(head[at + 15 :].split(b"\r\n", 1)[0])
        if len(self._buffer) < self._whole:
            return
        now, run = time.perf_counter(), self._run
        if run.measure_from <= now < run.measure_until:
            run.seconds.append(now - self._start)
        run.answered += 1
        if run.answered % CHECKED_EVERY == 0:
            run.check(self._row, bytes(self._buffer[self._head :]))
        self._buffer.clear()
        self._whole = 0
        if now < run.measure_until and not run.failure:
            self._send()
        else:
            self._transport.close()

    def connection_lost(self, _exc: Exception | None) -> None:
        run = self._run
        if time.perf_counter() < run.measure_until and not run.failure:
            run.failure = "the server closed a connection"
        run.open -= 1
        if not run.open:
            self._ended.set()


async def load(order: Order, bodies: list[bytes], expected: Rows) -> dict[str, float | int | str]:
    """Run one order: requests/s, percentiles in ms, and how wrong the worst checked row was."""
    requests = [
        f"POST {order.target} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {order.media_type}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
        for body in bodies
    ]
    start = time.perf_counter() + order.warm_up_seconds
    run = Run(order, requests, expected, start, start + order.seconds)
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for _ in range(order.connections):
        await loop.create_connection(lambda: Connection(run, ended), "127.0.0.1", order.port)
    async with asyncio.timeout(order.warm_up_seconds + order.seconds + 20):
        await ended.wait()
    if run.failure or not run.seconds:
        return {"failure": run.failure or "nothing was answered"}
    p50, p99 = (float(np.percentile(run.seconds, q)) * 1000 for q in (50, 99))
    return {
        "requests_per_second": len(run.seconds) / order.seconds,
        "p50_ms": p50,
        "p99_ms": p99,
        "checked": run.checked,
        "worst_difference": run.worst,
    }


def main() -> None:
    folder = Path(sys.argv[1])
    rows: Rows = np.load(folder / "rows.npy", allow_pickle=False)
    expected: Rows = np.load(folder / "expected.npy", allow_pickle=False)
    packed = [{"layer": 0, "hidden_states": ["float32", [1, row.size], row.tobytes()]} for row in rows]
    raw_bodies, packed_bodies = [row.tobytes() for row in rows], [msgspec.msgpack.encode(body) for body in packed]
    print("ready", flush=True)
    for line in sys.stdin:
        order = msgspec.json.decode(line, type=Order)
        bodies = raw_bodies if order.media_type == RAW else packed_bodies
        print(json.dumps(uvloop.run(load(order, bodies, expected))), flush=True)


if __name__ == "__main__":
    main()
