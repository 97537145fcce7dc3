"""Many small forward requests at once: each is answered as if it were alone."""

from __future__ import annotations

import asyncio
import re

import httpx
import msgpack
import numpy as np
import numpy.typing as npt
import pytest

from tests.running import Stack, wait_until
from tests.stack.looking import http

HIDDEN = 256
RAW = {"content-type": "application/octet-stream"}
Rows = npt.NDArray[np.float32]


def rows(count: int, seed: int = 0) -> Rows:
    return np.random.default_rng(seed).standard_normal((count, HIDDEN)).astype(np.float32)


async def forward(client: httpx.AsyncClient, hidden: Rows, layer: int = 0) -> Rows:
    answer = await client.post(f"/v1/moe/forward?layer={layer}", content=hidden.tobytes(), headers=RAW)
    assert answer.status_code == 200, answer.text
    return np.frombuffer(answer.content, np.float32).reshape(-1, HIDDEN)


async def test_an_answer_does_not_depend_on_who_asks_at_the_same_time(stack: Stack) -> None:
    hidden = [rows(1 + n % 3, seed=n) for n in range(60)]
    async with http(stack) as client:
        alone = [await forward(client, each, n % 4) for n, each in enumerate(hidden)]
        together = await asyncio.gather(*(forward(client, each, n % 4) for n, each in enumerate(hidden)))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


async def test_the_three_forms_travel_together(stack: Stack) -> None:
    hidden = rows(3)
    packed = msgpack.packb({"layer": 1, "hidden_states": ["float32", [1, HIDDEN], hidden[1].tobytes()]})
    async with http(stack) as client:
        whole = await forward(client, hidden, 1)
        raw, as_msgpack, as_json = await asyncio.gather(
            forward(client, hidden[:1], 1),
            client.post("/v1/moe/forward", content=packed, headers={"content-type": "application/msgpack"}),
            client.post("/v1/moe/forward", json={"layer": 1, "hidden_states": hidden[2:].tolist()}),
        )
    np.testing.assert_array_equal(raw[0], whole[0])
    np.testing.assert_array_equal(
        np.frombuffer(msgpack.unpackb(as_msgpack.content)["hidden_states"][2], "<f4"), whole[1]
    )
    np.testing.assert_array_equal(np.float32(as_json.json()["hidden_states"][0]), whole[2])
    assert [len(as_json.json()[name][0]) for name in ("top_k_index", "top_k_weights")] == [2, 2]


async def test_a_bad_request_among_good_ones_is_the_only_one_refused(stack: Stack) -> None:
    bad = [
        ("?layer=0", np.full((1, HIDDEN), np.nan, np.float32).tobytes(), 400),
        ("?layer=0", b"\0" * 1023, 400),
        ("?layer=99", rows(1).tobytes(), 400),
        ("", rows(1).tobytes(), 400),
    ]
    async with http(stack) as client:
        expected = [await forward(client, rows(1, seed=n)) for n in range(20)]
        good = [asyncio.create_task(forward(client, rows(1, seed=n))) for n in range(20)]
        refused = await asyncio.gather(
            *(client.post(f"/v1/moe/forward{query}", content=body, headers=RAW) for query, body, _ in bad)
        )
        for answer, (_, _, status) in zip(refused, bad, strict=True):
            assert answer.status_code == status
            assert answer.json()["error"]["code"] == "invalid_request"
        for task, one in zip(good, expected, strict=True):
            np.testing.assert_array_equal(await task, one)


async def test_clients_that_leave_do_not_harm_the_others(stack: Stack) -> None:
    host, port = stack.url.removeprefix("http://").split(":")
    body = rows(1).tobytes()
    head = f"POST /v1/moe/forward?layer=0 HTTP/1.1\r\nHost: x\r\nContent-Type: {RAW['content-type']}\r\n"
    async with http(stack) as client:
        expected = await forward(client, rows(1, seed=7))
        for _ in range(5):
            for sent in (body, body[:100]):  # those who leave after asking, and in the middle of it
                _, writer = await asyncio.open_connection(host, int(port))
                writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + sent)
                await writer.drain()
                writer.close()
            answers = await asyncio.gather(*(forward(client, rows(1, seed=7)) for _ in range(8)))
            for answer in answers:
                np.testing.assert_array_equal(answer, expected)
    async with http(stack) as client:

        async def count(status: str) -> bool:
            text = (await client.get("/metrics")).text
            return f'endpoint="/v1/moe/forward",method="POST",status="{status}"' in text

        await wait_until(lambda: count("499"), "those who left in the middle to be counted as such")


async def test_a_body_that_no_message_can_carry_is_cut(stack: Stack) -> None:
    hidden = rows(9000)
    async with http(stack) as client:
        whole = await forward(client, hidden)
        np.testing.assert_array_equal(whole[:50], await forward(client, hidden[:50]))
        np.testing.assert_array_equal(whole[-50:], await forward(client, hidden[-50:]))


async def test_ids_of_gathered_requests_are_in_the_log_with_that_of_their_message(stack: Stack) -> None:
    async with http(stack) as client:
        names = [f"gathered-{n}" for n in range(12)]
        answers = await asyncio.gather(
            *(
                client.post("/v1/moe/forward?layer=0", content=rows(1).tobytes(), headers={**RAW, "x-request-id": name})
                for name in names
            )
        )
    assert [answer.headers["x-request-id"] for answer in answers] == names

    def found() -> bool:
        lines = [line for line in stack.log.read_text().splitlines() if "forward.answered" in line]
        logged = {name for line in lines for name in re.findall(r"gathered-\d+", line)}
        return logged == set(names)

    await wait_until(found, "each id to be logged", 10)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
async def test_other_methods_are_refused(stack: Stack, method: str) -> None:
    async with http(stack) as client:
        answer = await client.request(method, "/v1/moe/forward")
    assert answer.status_code == 405
    assert answer.json()["error"]["code"] == "method_not_allowed"
