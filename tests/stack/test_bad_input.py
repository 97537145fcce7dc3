"""Bad input: one clear error in OpenAI's shape, and the next request works."""

from __future__ import annotations

from typing import Any

import httpx
import msgpack
import pytest

from tests.running import Stack

GOOD = {"prompt": "import os", "max_tokens": 2}
CASES: list[tuple[str, dict[str, Any], int, str]] = [
    ("empty prompt", {"prompt": ""}, 400, "invalid_request"),
    ("no prompt", {}, 400, "invalid_request"),
    ("too long", {"prompt": [5] * 2000}, 400, "context_length_exceeded"),
    ("too many new tokens", {"prompt": "a", "max_tokens": 5000}, 400, "context_length_exceeded"),
    ("unknown model", {"prompt": "a", "model": "gpt"}, 404, "model_not_found"),
    ("token out of vocabulary", {"prompt": [5, 99999]}, 400, "invalid_request"),
    ("wrong type", {"prompt": {"a": 1}}, 400, "invalid_request"),
    ("temperature", {"prompt": "a", "temperature": -1}, 400, "invalid_request"),
    ("top_p", {"prompt": "a", "top_p": 0}, 400, "invalid_request"),
    ("n", {"prompt": "a", "n": 0}, 400, "invalid_request"),
    ("max_tokens as text", {"prompt": "a", "max_tokens": "many"}, 400, "invalid_request"),
    ("logprobs", {"prompt": "a", "logprobs": 99}, 400, "invalid_request"),
    ("logit_bias", {"prompt": "a", "logit_bias": {"x": 1}}, 400, "invalid_request"),
]


async def check(http: httpx.AsyncClient, answer: httpx.Response, status: int, code: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == code
    assert error["message"]
    assert "Traceback" not in answer.text
    assert (await http.post("/v1/completions", json=GOOD)).status_code == 200


@pytest.mark.parametrize(("name", "body", "status", "code"), CASES, ids=[case[0] for case in CASES])
async def test_a_bad_completion_request(stack: Stack, name: str, body: dict[str, Any], status: int, code: str) -> None:
    async with httpx.AsyncClient(base_url=stack.url, timeout=30) as http:
        await check(http, await http.post("/v1/completions", json=body), status, code)


@pytest.mark.parametrize("body", [b"{", b"[1]", b'{"prompt": "\xff"}', b'{"prompt": NaN}', b"[" * 100000])
async def test_a_body_that_is_no_json_object(stack: Stack, body: bytes) -> None:
    async with httpx.AsyncClient(base_url=stack.url, timeout=30) as http:
        await check(http, await http.post("/v1/completions", content=body), 400, "invalid_request")


async def test_a_huge_body(stack: Stack) -> None:
    async with httpx.AsyncClient(base_url=stack.url, timeout=30) as http:
        answer = await http.post("/v1/completions", content=b" " * (33 * 2**20))
        await check(http, answer, 413, "payload_too_large")


@pytest.mark.parametrize(
    "hidden", [[[1.0]], [], [[1.0] * 256, [1.0]], [["a"] * 256]], ids=["width", "no rows", "ragged", "text"]
)
async def test_wrong_hidden_states(stack: Stack, hidden: list[Any]) -> None:
    async with httpx.AsyncClient(base_url=stack.url, timeout=30) as http:
        answer = await http.post("/v1/moe/forward", json={"layer": 0, "hidden_states": hidden})
        await check(http, answer, 400, "invalid_request")


@pytest.mark.parametrize(
    "packed",
    [
        b"\xc1",
        msgpack.packb({"layer": 0})[:-2],
        msgpack.packb({"layer": 0, "hidden_states": ["float32", [2**40, 256], b""]}),
        msgpack.packb({"layer": 0, "hidden_states": ["complex64", [1, 256], b"\0" * 1024]}),
        msgpack.packb({"layer": 0, "hidden_states": ["float32", [1, 256], b"\0\0\xc0\x7f" * 256]}),
    ],
    ids=["garbage", "truncated", "giant", "dtype", "nan"],
)
async def test_hostile_msgpack(stack: Stack, packed: bytes) -> None:
    async with httpx.AsyncClient(base_url=stack.url, timeout=30) as http:
        headers = {"content-type": "application/msgpack"}
        answer = await http.post("/v1/moe/forward", content=packed, headers=headers)
        await check(http, answer, 400, "invalid_request")


async def test_forward_and_route_answer(stack: Stack) -> None:
    async with httpx.AsyncClient(base_url=stack.url, timeout=30) as http:
        answer = (await http.post("/v1/moe/forward", json={"layer": 1, "hidden_states": [[0.1] * 256] * 3})).json()
        assert len(answer["hidden_states"]) == 3
        route = (await http.post("/v1/moe/route", json={"prompt": "import os"})).json()
        assert len(route["layers"]) == 4
        assert len(route["layers"][0]["experts"]) == len(route["token_ids"])
