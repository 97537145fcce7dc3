"""The same seed gives the same text: alone, among others, and wherever the experts are."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx

from tests.oracle import make_checkpoint
from tests.running import running_stack
from tests.stack.looking import http

OTHERS = 15


def request(seed: int, **more: Any) -> dict[str, Any]:
    prompt = [2 + (seed * 31 + n * 17) % 150 for n in range(3 + 5 * seed % 40)]
    return {"prompt": prompt, "max_tokens": 40, "seed": seed, "ignore_eos": True, **more}


async def text(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


async def test_a_seed_gives_the_same_text_everywhere(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "m", "qwen3")
    layouts = (("--experts", "1", "--shards", "2"), ("--experts", "2", "--shards", "2"))
    said = []
    for number, layout in enumerate(layouts):
        folder = tmp_path / str(number)
        folder.mkdir()
        async with (
            running_stack(folder, "--model", str(path), *layout, LOG_LEVEL="WARNING") as stack,
            http(stack) as client,
        ):
            said.append([await text(client, request(seed)) for seed in range(3)])
            crowd = [text(client, request(100 + n, max_tokens=30 + n)) for n in range(OTHERS)]
            again = [text(client, request(seed)) for seed in range(3)]
            said.append((await asyncio.gather(*crowd, *again))[OTHERS:])
    assert all(each == said[0] for each in said), said
    assert len(set(said[0])) == 3
