"""Bad input: one clear error in OpenAI's shape, and the next request works."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgpack
import pytest

from tests.running import Stack

GOOD = {"prompt": "import os", "max_tokens": 2}
CASES: list[tuple[str, dict[str, Any], int, str]] = [
    ("empty prompt", {"prompt": ""}, 400, "invalid_request"),
    ("empty list", {"prompt": []}, 400, "invalid_request"),
    ("empty list in a list", {"prompt": [[]]}, 400, "invalid_request"),
    ("empty text in a list", {"prompt": ["a", ""]}, 400, "invalid_request"),
    ("mixed list", {"prompt": ["a", 5]}, 400, "invalid_request"),
    ("null prompt", {"prompt": None}, 400, "invalid_request"),
    ("half a surrogate pair", {"prompt": "\ud800"}, 400, "invalid_request"),
    ("no prompt", {}, 400, "invalid_request"),
    ("too long", {"prompt": [5] * 2000}, 400, "context_length_exceeded"),
    ("too long in a list", {"prompt": ["a", "b " * 2000]}, 400, "context_length_exceeded"),
    ("too long by one", {"prompt": [5] * 1024, "max_tokens": 1}, 400, "context_length_exceeded"),
    ("too many new tokens", {"prompt": "a", "max_tokens": 5000}, 400, "context_length_exceeded"),
    ("unknown model", {"prompt": "a", "model": "gpt"}, 404, "model_not_found"),
    ("token out of vocabulary", {"prompt": [5, 99999]}, 400, "invalid_request"),
    ("token at the vocabulary's end", {"prompt": [4096]}, 400, "invalid_request"),
    ("negative token", {"prompt": [5, -1]}, 400, "invalid_request"),
    ("token beyond 64 bits", {"prompt": [2**70]}, 400, "invalid_request"),
    ("token as a truth value", {"prompt": [True]}, 400, "invalid_request"),
    ("token as a fraction", {"prompt": [5.5]}, 400, "invalid_request"),
    ("wrong type", {"prompt": {"a": 1}}, 400, "invalid_request"),
    ("model as a number", {"prompt": "a", "model": 5}, 400, "invalid_request"),
    ("temperature", {"prompt": "a", "temperature": -1}, 400, "invalid_request"),
    ("temperature too high", {"prompt": "a", "temperature": 1e9}, 400, "invalid_request"),
    ("temperature as text", {"prompt": "a", "temperature": "warm"}, 400, "invalid_request"),
    ("top_p", {"prompt": "a", "top_p": 0}, 400, "invalid_request"),
    ("top_k", {"prompt": "a", "top_k": -2}, 400, "invalid_request"),
    ("min_p", {"prompt": "a", "min_p": 2}, 400, "invalid_request"),
    ("presence_penalty", {"prompt": "a", "presence_penalty": 3}, 400, "invalid_request"),
    ("frequency_penalty", {"prompt": "a", "frequency_penalty": -3}, 400, "invalid_request"),
    ("repetition_penalty", {"prompt": "a", "repetition_penalty": 0}, 400, "invalid_request"),
    ("seed", {"prompt": "a", "seed": 2**64}, 400, "invalid_request"),
    ("seed as a fraction", {"prompt": "a", "seed": 0.5}, 400, "invalid_request"),
    ("negative max_tokens", {"prompt": "a", "max_tokens": -1}, 400, "invalid_request"),
    ("no new tokens", {"prompt": "a", "max_tokens": 0}, 400, "invalid_request"),
    ("empty stop", {"prompt": "a", "stop": ""}, 400, "invalid_request"),
    ("many stops", {"prompt": "a", "stop": ["x"] * 17}, 400, "invalid_request"),
    ("stop as a number", {"prompt": "a", "stop": 5}, 400, "invalid_request"),
    ("stop token", {"prompt": "a", "stop_token_ids": [-1]}, 400, "invalid_request"),
    ("stream as text", {"prompt": "a", "stream": "perhaps"}, 400, "invalid_request"),
    ("stream options", {"prompt": "a", "stream_options": {"include_usage": True}}, 400, "invalid_request"),
    ("best_of", {"prompt": "a", "best_of": 3}, 400, "invalid_request"),
    ("n", {"prompt": "a", "n": 0}, 400, "invalid_request"),
    ("max_tokens as text", {"prompt": "a", "max_tokens": "many"}, 400, "invalid_request"),
    ("logprobs", {"prompt": "a", "logprobs": 99}, 400, "invalid_request"),
    ("logit_bias", {"prompt": "a", "logit_bias": {"x": 1}}, 400, "invalid_request"),
    ("logit_bias too large", {"prompt": "a", "logit_bias": {"5": 101}}, 400, "invalid_request"),
    ("logit_bias out of vocabulary", {"prompt": "a", "logit_bias": {"4096": 1}}, 400, "invalid_request"),
    ("logit_bias beyond 64 bits", {"prompt": "a", "logit_bias": {"9" * 30: 1}}, 400, "invalid_request"),
]
HELLO = [{"role": "user", "content": "hello"}]
CHAT_CASES: list[tuple[str, dict[str, Any], int, str]] = [
    ("no messages", {}, 400, "invalid_request"),
    ("empty messages", {"messages": []}, 400, "invalid_request"),
    ("messages as text", {"messages": "hello"}, 400, "invalid_request"),
    ("message without a role", {"messages": [{"content": "hello"}]}, 400, "invalid_request"),
    ("content as a number", {"messages": [{"role": "user", "content": 5}]}, 400, "invalid_request"),
    ("image", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "invalid_request"),
    ("too long", {"messages": [{"role": "user", "content": "b " * 3000}]}, 400, "context_length_exceeded"),
    ("half a surrogate pair", {"messages": [{"role": "user", "content": "\ud800"}]}, 400, "invalid_request"),
    ("unknown model", {"messages": HELLO, "model": "gpt"}, 404, "model_not_found"),
    ("too many new tokens", {"messages": HELLO, "max_tokens": 5000}, 400, "context_length_exceeded"),
    ("no new tokens", {"messages": HELLO, "max_tokens": 0}, 400, "invalid_request"),
    ("no new tokens by the new name", {"messages": HELLO, "max_completion_tokens": 0}, 400, "invalid_request"),
    ("top_logprobs alone", {"messages": HELLO, "top_logprobs": 2}, 400, "invalid_request"),
    ("too many top_logprobs", {"messages": HELLO, "logprobs": True, "top_logprobs": 21}, 400, "invalid_request"),
    ("temperature", {"messages": HELLO, "temperature": 101}, 400, "invalid_request"),
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
        # httpx would refuse half a surrogate pair itself.
        await check(http, await http.post("/v1/completions", content=json.dumps(body)), status, code)


@pytest.mark.parametrize(("name", "body", "status", "code"), CHAT_CASES, ids=[case[0] for case in CHAT_CASES])
async def test_a_bad_chat_request(stack: Stack, name: str, body: dict[str, Any], status: int, code: str) -> None:
    async with httpx.AsyncClient(base_url=stack.url, timeout=30) as http:
        # httpx would refuse half a surrogate pair itself.
        answer = await http.post("/v1/chat/completions", content=json.dumps(body))
        await check(http, answer, status, code)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b'"text"',
        b"null",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\xc3"}',
        b'{"prompt": NaN}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a",}',
        b'{"prompt": "a"} trailing',
        b"\xef\xbb\xbf{}",
        b"\x00" * 100,
        b"[" * 100000,
        b'{"prompt": ' + b"[" * 100000,
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/moe/route", "/tokenize"])
async def test_a_body_that_is_no_json_object(stack: Stack, path: str, body: bytes) -> None:
    async with httpx.AsyncClient(base_url=stack.url, timeout=30) as http:
        await check(http, await http.post(path, content=body), 400, "invalid_request")


async def test_a_number_beyond_floats(stack: Stack) -> None:
    async with httpx.AsyncClient(base_url=stack.url, timeout=30) as http:
        answer = await http.post("/v1/completions", content=b'{"prompt": "a", "temperature": 1e999}')
        await check(http, answer, 400, "invalid_request")


async def chunks(size: int) -> AsyncIterator[bytes]:
    for _ in range(size):
        yield b" " * 2**20


async def test_a_huge_body_without_a_length(stack: Stack) -> None:
    async with httpx.AsyncClient(base_url=stack.url, timeout=30) as http:
        answer = await http.post("/v1/completions", content=chunks(34))
        await check(http, answer, 413, "payload_too_large")


async def test_a_huge_body(stack: Stack) -> None:
    async with httpx.AsyncClient(base_url=stack.url, timeout=30) as http:
        answer = await http.post("/v1/completions", content=b" " * (33 * 2**20))
        await check(http, answer, 413, "payload_too_large")


@pytest.mark.parametrize(
    "hidden",
    [
        [[1.0]],
        [],
        [[]],
        [[1.0] * 256, [1.0]],
        [["a"] * 256],
        [1.0] * 256,
        [[[1.0] * 256]],
        None,
        "AAAA",
        [[1e39] * 256],
    ],
    ids=["width", "no rows", "empty row", "ragged", "text", "1-d", "3-d", "null", "one text", "beyond float32"],
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
        msgpack.packb({"layer": 0, "hidden_states": ["float32", [1, 256], b"\0\0\x80\x7f" * 256]}),
        msgpack.packb({"layer": 0, "hidden_states": ["float32", [1, 256], b"\0" * 1023]}),
        msgpack.packb({"layer": 0, "hidden_states": ["float32", [2, 128], b"\0" * 1024]}),
        msgpack.packb({"layer": 0, "hidden_states": ["float32", [256], b"\0" * 1024]}),
        msgpack.packb({"layer": 0, "hidden_states": ["float32", [-1, -256], b"\0" * 1024]}),
        msgpack.packb({"layer": 0, "hidden_states": ["float32", [2**64 - 1, 256], b""]}),
        msgpack.packb({"layer": 0, "hidden_states": ["float32", [1] * 4000, b"\0" * 4]}),
        msgpack.packb({"layer": 0, "hidden_states": ["int64", [1, 256], b"\0" * 2048]}),
        msgpack.packb({"layer": -1, "hidden_states": ["float32", [1, 256], b"\0" * 1024]}),
        msgpack.packb({"layer": 99, "hidden_states": ["float32", [1, 256], b"\0" * 1024]}),
        msgpack.packb({"layer": 0, "hidden_states": msgpack.ExtType(5, b"\0" * 1024)}),
        b"\x91" * 100000,
        b"\xdd\xff\xff\xff\xff",
    ],
    ids=[
        *("garbage", "truncated", "giant", "dtype", "nan", "infinity", "short", "shape", "1-d", "negative"),
        *("overflow", "dimensions", "integers", "negative layer", "no such layer", "extension", "deep", "long"),
    ],
)
async def test_hostile_msgpack(stack: Stack, packed: bytes) -> None:
    async with httpx.AsyncClient(base_url=stack.url, timeout=30) as http:
        headers = {"content-type": "application/msgpack"}
        answer = await http.post("/v1/moe/forward", content=packed, headers=headers)
        await check(http, answer, 400, "invalid_request")


@pytest.mark.parametrize(
    ("query", "content"),
    [
        ("", b"\0" * 1024),
        ("?layer=x", b"\0" * 1024),
        ("?layer=-1", b"\0" * 1024),
        ("?layer=0", b"\0" * 1023),
        ("?layer=0", b""),
        ("?layer=77", b"\0" * 1024),
        ("?layer=0", b"\0\0\xc0\x7f" * 256),
    ],
    ids=["no layer", "layer as text", "negative layer", "size", "empty", "no such layer", "nan"],
)
async def test_wrong_raw_hidden_states(stack: Stack, query: str, content: bytes) -> None:
    async with httpx.AsyncClient(base_url=stack.url, timeout=30) as http:
        headers = {"content-type": "application/octet-stream"}
        answer = await http.post(f"/v1/moe/forward{query}", content=content, headers=headers)
        await check(http, answer, 400, "invalid_request")


async def test_forward_and_route_answer(stack: Stack) -> None:
    async with httpx.AsyncClient(base_url=stack.url, timeout=30) as http:
        answer = (await http.post("/v1/moe/forward", json={"layer": 1, "hidden_states": [[0.1] * 256] * 3})).json()
        assert len(answer["hidden_states"]) == 3
        route = (await http.post("/v1/moe/route", json={"prompt": "import os"})).json()
        assert len(route["layers"]) == 4
        assert len(route["layers"][0]["experts"]) == len(route["token_ids"])
