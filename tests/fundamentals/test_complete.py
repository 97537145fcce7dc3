"""Complete a prompt: one POST, text back."""

from __future__ import annotations

import httpx

from tests.running import Stack


async def test_a_prompt_is_completed(stack: Stack) -> None:
    async with httpx.AsyncClient(base_url=stack.url, timeout=30) as http:
        body = {"prompt": "def read_file(path):", "max_tokens": 16, "temperature": 0}
        answer = (await http.post("/v1/completions", json=body)).json()

    assert answer["object"] == "text_completion"
    assert answer["choices"][0]["text"]
    assert answer["choices"][0]["finish_reason"] in {"length", "stop"}
    assert 1 <= answer["usage"]["completion_tokens"] <= 16


async def test_temperature_0_says_the_same_each_time(stack: Stack) -> None:
    async with httpx.AsyncClient(base_url=stack.url, timeout=30) as http:
        body = {"prompt": "import ", "max_tokens": 8, "temperature": 0}
        first, second = [(await http.post("/v1/completions", json=body)).json() for _ in range(2)]

    assert first["choices"][0]["text"] == second["choices"][0]["text"]
