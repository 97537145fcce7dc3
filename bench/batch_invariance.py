"""Measures how often a seeded text depends on what else is in the batch, or on how many workers hold the experts.

python -m bench.batch_invariance [--model DIR] [--requests 64] [--tokens 48]

Each request runs alone, then among 15 others; with 2 workers, then with 1. Prints, per dtype, how many texts differ.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

import httpx

from bench.stack import stack

PROMPTS = ("import ", "def read(", "class Parser:", "for line in ", "    return ", "try:\n", "if __name__", "# ")
TOGETHER = 16


async def _texts(url: str, count: int, tokens: int, together: int) -> list[str]:
    """`count` seeded texts, `together` at a time."""
    limit = asyncio.Semaphore(together)
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:

        async def one(number: int) -> str:
            body = {"prompt": PROMPTS[number % len(PROMPTS)], "seed": number, "max_tokens": tokens, "ignore_eos": True}
            async with limit:
                answer = await http.post("/v1/completions", json=body)
            answer.raise_for_status()
            return str(answer.json()["choices"][0]["text"])

        return list(await asyncio.gather(*(one(number) for number in range(count))))


def _report(dtype: str, what: str, one: list[str], other: list[str]) -> None:
    differ = sum(a != b for a, b in zip(one, other, strict=True))
    print(f"{dtype:9} {what:24} {differ:4} of {len(one)} texts differ ({differ / len(one):.1%})")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/demo"))
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    where = ("--model", str(options.model), "--shards", "2")
    for dtype in ("float32", "bfloat16"):
        async with stack(*where, "--experts", "2", DTYPE=dtype) as url:
            alone = await _texts(url, options.requests, options.tokens, 1)
            crowded = await _texts(url, options.requests, options.tokens, TOGETHER)
        async with stack(*where, "--experts", "1", DTYPE=dtype) as url:
            elsewhere = await _texts(url, options.requests, options.tokens, 1)
        _report(dtype, f"alone / {TOGETHER} together", alone, crowded)
        _report(dtype, "2 workers / 1 worker", alone, elsewhere)


if __name__ == "__main__":
    asyncio.run(main())
