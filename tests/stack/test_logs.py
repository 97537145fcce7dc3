"""Logs: one request can be followed from the gateway to the experts; JSON where machines read them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx

from tests.oracle import make_checkpoint
from tests.running import Stack, running_stack, wait_until


async def test_a_request_id_is_in_the_logs_of_gateway_router_and_expert(stack: Stack) -> None:
    async with httpx.AsyncClient(base_url=stack.url, timeout=60) as http:
        body = {"prompt": "import os", "max_tokens": 4, "ignore_eos": True}
        answer = await http.post("/v1/completions", json=body, headers={"X-Request-Id": "follow-me.1"})
    assert answer.headers["x-request-id"] == "follow-me.1"

    def services() -> set[str]:
        lines = [line for line in stack.log.read_text().splitlines() if "follow-me.1" in line]
        return {found[1] for line in lines if (found := re.search(r"service=(\w+)", line))}

    await wait_until(lambda: services() >= {"gateway", "router", "expert"}, "all three to name the request", 10)


async def test_an_id_that_could_inject_is_replaced(stack: Stack) -> None:
    async with httpx.AsyncClient(base_url=stack.url, timeout=60) as http:
        answer = await http.get("/v1/models", headers={"X-Request-Id": "a b\tc"})
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])


async def test_in_production_every_line_of_a_service_is_json(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "tiny", "mixtral")
    token = "a-token-of-enough-letters"
    async with running_stack(tmp_path, "--model", str(path), ENV="production", API_AUTH_TOKEN=token) as production:
        async with httpx.AsyncClient(base_url=production.url, timeout=60) as http:
            await http.get("/v1/models", headers={"Authorization": f"Bearer {token}"})
        lines = [line for line in production.log.read_text().splitlines() if line.startswith("{")]
    events = [json.loads(line) for line in lines]
    assert {event["service"] for event in events} >= {"gateway", "router", "expert"}
    assert all(event.keys() >= {"event", "level", "timestamp"} for event in events)
    assert token not in production.log.read_text()
