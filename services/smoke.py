"""`openmoe smoke URL`: does a deployment work? Health, a completion, a stream, one MoE layer, metrics; a table."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
from rich.table import Table

PROMPT = "def read_file(path):"
TOKENS = 8


class CheckFailedError(Exception):
    """A check's finding; its text says what was expected and what came."""


@dataclass(frozen=True)
class Result:
    """One check."""

    name: str
    ok: bool
    detail: str
    seconds: float


def _expect(condition: object, text: str) -> None:
    if not condition:
        raise CheckFailedError(text)


def _json(answer: httpx.Response) -> Any:
    if answer.status_code != 200:
        raise CheckFailedError(f"HTTP {answer.status_code}: {answer.text[:200]}")
    return answer.json()


class Smoke:
    """The checks against one server, in order."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        self._text = ""

    def health(self) -> str:
        body = _json(self._http.get("/health"))
        down = [name for name, part in body["parts"].items() if not part["ready"]]
        return f"{body['deployment']}, all parts ready" if not down else f"ready, without {', '.join(down)}"

    def models(self) -> str:
        names = [model["id"] for model in _json(self._http.get("/v1/models"))["data"]]
        _expect(names, "no model is listed")
        return ", ".join(names)

    def completion(self) -> str:
        body = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        answer = _json(self._http.post("/v1/completions", json=body))
        self._text = answer["choices"][0]["text"]
        count = answer["usage"]["completion_tokens"]
        _expect(count == TOKENS, f"{TOKENS} tokens were asked for, {count} came")
        return repr(self._text)

    def stream(self) -> str:
        body = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
        pieces: list[str] = []
        done = False
        with self._http.stream("POST", "/v1/completions", json=body) as answer:
            _expect(answer.status_code == 200, f"HTTP {answer.status_code}")
            for line in answer.iter_lines():
                done = done or line == "data: [DONE]"
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    _expect("error" not in event, str(event.get("error")))
                    pieces += [choice["text"] for choice in event["choices"]]
        _expect(done, "the stream ended without [DONE]")
        _expect("".join(pieces) == self._text, f"streamed {''.join(pieces)!r}, whole {self._text!r}")
        return f"{len(pieces)} events, the same text"

    def moe(self) -> str:
        route = _json(self._http.post("/v1/moe/route", json={"prompt": PROMPT}))
        return f"{len(route['layers'])} MoE layers, {len(route['token_ids'])} tokens routed"

    def metrics(self) -> str:
        answer = self._http.get("/metrics")
        _expect(answer.status_code == 200, f"HTTP {answer.status_code}")
        lines = [line for line in answer.text.splitlines() if line.startswith("moe_generation_tokens_total")]
        _expect(lines and float(lines[0].rsplit(" ", 1)[1]) >= 0, "moe_generation_tokens_total is missing")
        return f"{len(answer.text.splitlines())} lines"

    def run(self) -> list[Result]:
        """Every check, each by itself: one that fails does not hide the next."""
        checks = (self.health, self.models, self.completion, self.stream, self.moe, self.metrics)
        return [_timed(check) for check in checks]


def _timed(check: Callable[[], str]) -> Result:
    start = time.perf_counter()
    try:
        ok, detail = True, check()
    except CheckFailedError as error:
        ok, detail = False, str(error)
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        ok, detail = False, f"{type(error).__name__}: {error}"
    return Result(check.__name__, ok, detail, time.perf_counter() - start)


def smoke(url: str, api_key: str | None, timeout: float) -> list[Result]:
    """Check the server at `url`."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with httpx.Client(base_url=url, headers=headers, timeout=timeout, trust_env=False) as http:
        return Smoke(http).run()


def smoke_table(results: list[Result]) -> Table:
    table = Table("check", "", "what was seen", "seconds")
    for result in results:
        mark = "[green]ok[/green]" if result.ok else "[red]failed[/red]"
        table.add_row(result.name, mark, result.detail.replace("[", "\\["), f"{result.seconds:.3f}")
    return table
