"""Stream a completion: text arrives as server-sent events while the model still writes."""

from __future__ import annotations

import json

import httpx

from tests.running import Stack


async def test_text_arrives_piece_by_piece(stack: Stack) -> None:
    body = {"prompt": "def read_file(path):", "max_tokens": 16, "temperature": 0, "stream": True}
    async with httpx.AsyncClient(base_url=stack.url, timeout=30) as http:
        async with http.stream("POST", "/v1/completions", json=body) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            events = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
        whole = (await http.post("/v1/completions", json={**body, "stream": False})).json()

    assert events[-1] == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    assert len(choices) > 1
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    assert choices[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]
