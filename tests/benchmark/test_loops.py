"""The closed and the open loop, against real servers that hold their answers back."""

from __future__ import annotations

import asyncio

import pytest

from services import benchmark
from services.benchmark import TOO_MANY, Length, Traffic, closed_loop, open_loop
from services.benchmark_http import Client
from services.benchmark_requests import Request, arrivals, generation
from tests.benchmark.servers import DONE, TOKEN, USAGE, chunked, serving, whole

ANSWER = chunked(TOKEN, TOKEN, USAGE, DONE)


def make(_number: int) -> Request:
    return generation("/p", {"prompt": "a"}, None, 2)


async def test_a_closed_loop_keeps_so_many_in_flight_and_never_more() -> None:
    waiting: list[asyncio.StreamWriter] = []
    most = 0

    async def answer_in_fours(_body: bytes, writer: asyncio.StreamWriter) -> None:
        nonlocal most
        waiting.append(writer)
        most = max(most, len(waiting))
        if len(waiting) == 4:  # a loop with fewer in flight would wait here for ever
            for each in waiting:
                each.write(ANSWER)
            waiting.clear()

    async with serving(answer_in_fours) as url:
        client = Client(url)
        traffic = Traffic(client, 10)
        start, seconds = await closed_loop(traffic, make, 4, Length(requests=20))
        client.close()
    assert (len(traffic.samples), traffic.failed, most) == (20, 0, 4)
    assert start + seconds == max(sample.ended for sample in traffic.samples)


async def test_an_open_loop_sends_though_nobody_answers_and_counts_from_the_schedule() -> None:
    waiting: list[asyncio.StreamWriter] = []

    async def answer_all_at_once(_body: bytes, writer: asyncio.StreamWriter) -> None:
        waiting.append(writer)
        if len(waiting) == 12:
            for each in waiting:
                each.write(ANSWER)

    async with serving(answer_all_at_once) as url:
        client = Client(url)
        traffic = Traffic(client, 10)
        start, _ = await open_loop(traffic, make, arrivals(200, seed=3), Length(requests=12))
        client.close()
    assert (len(traffic.samples), traffic.failed) == (12, 0)
    next_in, due, scheduled = arrivals(200, seed=3), start, []
    for _ in range(12):
        due += next_in()
        scheduled.append(due)
    samples = sorted(traffic.samples, key=lambda sample: sample.due)
    assert [sample.due for sample in samples] == scheduled
    assert all(sample.sent >= sample.due for sample in samples)


async def test_an_open_loop_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "MAX_IN_FLIGHT", 3)

    async def never(_body: bytes, _writer: asyncio.StreamWriter) -> None:
        return

    async with serving(never) as url:
        client = Client(url)
        traffic = Traffic(client, 0.5)
        await open_loop(traffic, make, lambda: 0.001, Length(requests=10))
        client.close()
    assert len(traffic.samples) == 3
    assert traffic.not_sent == {TOO_MANY: 7}
    assert traffic.failed == 10


async def test_a_length_in_seconds_ends_both_loops() -> None:
    async def answer(_body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(whole(b"{}", "503 No"))

    async with serving(answer) as url:
        client = Client(url)
        closed, opened = Traffic(client, 5), Traffic(client, 5)
        assert (await closed_loop(closed, make, 2, Length(duration=0.3)))[1] == 0.3
        assert (await open_loop(opened, make, lambda: 0.1, Length(duration=0.35)))[1] == 0.35
        client.close()
    assert 2 <= len(closed.samples) <= 8, "a server that refuses at once must not be flooded"
    assert len(opened.samples) == 3
    assert {sample.failure for sample in closed.samples} == {"HTTP 503"}
