"""The client in the documents, run as it stands against real processes."""

from __future__ import annotations

import ast
import asyncio
import os
import re
import sys
from pathlib import Path

import httpx
import pytest

from tests.protocol.conftest import OwnBus
from tests.protocol.kinds import PROTOCOL, ROOT

BLOCK = re.compile(r"^```python\n(# nats_client\.py\n.*?)^```$", re.MULTILINE | re.DOTALL)
README = ROOT / "README.md"
PROMPT = "def read_file(path):"
ANSWER = re.compile(
    r"\Adeployment (?P<deployment>demo-[0-9a-f]{8})\n(?P<text>.*)\n"
    r"experts answered (?P<dtype>\w+) (?P<shape>\[.*?\]) (?P<rows>\[\[.*\]\])\n\Z",
    re.DOTALL,
)


def blocks(document: Path) -> list[str]:
    return BLOCK.findall(document.read_text(encoding="utf-8"))


def example() -> str:
    """The client's code: the README's, if it has one."""
    found = blocks(README) or blocks(PROTOCOL)
    assert found, "no document shows the client"
    return found[0]


def test_all_documents_show_the_same_client() -> None:
    shown = [*blocks(README), *blocks(PROTOCOL)]
    assert len(set(shown)) == 1


async def test_the_client_does_what_it_says(own_bus: OwnBus, tmp_path: Path) -> None:
    script = tmp_path / "nats_client.py"
    script.write_text(example(), encoding="utf-8")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(script),
        cwd=ROOT,
        env={**os.environ, "NATS_URL": own_bus.nats_url},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(60):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, err.decode()
    answer = ANSWER.match(out.decode())
    assert answer, out.decode()
    async with httpx.AsyncClient(base_url=own_bus.url, timeout=60) as http:
        body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0}
        completion = (await http.post("/v1/completions", json=body)).json()
        health = (await http.get("/health")).json()
    assert answer["deployment"] == health["deployment"]
    assert answer["text"] == completion["choices"][0]["text"], "the gateway continues the same prompt differently"
    assert (answer["dtype"], answer["shape"]) == ("float32", "[1, 256]")
    rows = ast.literal_eval(answer["rows"])
    assert [len(row) for row in rows] == [3]
    assert all(value != pytest.approx(0, abs=1e-9) for row in rows for value in row)
