"""With API_AUTH_TOKEN set, nothing but /health answers without it; production refuses to start without one."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from tests.oracle import make_checkpoint
from tests.running import Stack, running_stack, start, start_service
from tests.stack.looking import http

TOKEN = "a-token-of-some-length"
WRONG = {
    "none": None,
    "another": "Bearer another-token-of-some-length",
    "half": f"Bearer {TOKEN[:-1]}",
    "longer": f"Bearer {TOKEN}x",
    "upper case": f"Bearer {TOKEN.upper()}",
    "another scheme": f"Basic {TOKEN}",
    "no scheme": TOKEN,
    "only the scheme": "Bearer",
    "not ASCII": f"Bearer {TOKEN}é",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("auth") / "tiny", "mixtral")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def closed(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> AsyncIterator[Stack]:
    """A stack that asks for the token."""
    folder = tmp_path_factory.mktemp("closed")
    async with running_stack(folder, "--model", str(tiny), "--experts", "1", API_AUTH_TOKEN=TOKEN) as stack:
        yield stack


async def every_endpoint(stack: Stack) -> list[tuple[str, str]]:
    """(method, path) of all that the server's own description names, and of what it does not."""
    async with http(stack, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        paths = (await client.get("/openapi.json")).json()["paths"]
    named = [(method.upper(), path.replace("{name}", "tiny")) for path, methods in paths.items() for method in methods]
    return [*named, ("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/nowhere"), ("POST", "/health/")]


def is_refusal(answer: httpx.Response) -> bool:
    error = answer.json()["error"]
    assert error["code"] == "invalid_api_key"
    assert error["type"] == "authentication_error"
    assert TOKEN not in answer.text
    return answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"


async def test_everything_but_health_asks_for_the_token(closed: Stack) -> None:
    endpoints = await every_endpoint(closed)
    assert {("POST", "/v1/completions"), ("GET", "/metrics"), ("GET", "/v1/models")} <= set(endpoints)
    async with http(closed) as client:
        for method, path in endpoints:
            answer = await client.request(method, path)
            if path == "/health":
                assert answer.status_code == 200
            else:
                assert is_refusal(answer), (method, path, answer.text)


@pytest.mark.parametrize("header", WRONG.values(), ids=WRONG)
async def test_wrong_tokens_are_refused(closed: Stack, header: str | None) -> None:
    headers = {} if header is None else {b"Authorization": header.encode()}
    async with http(closed) as client:
        assert is_refusal(await client.post("/v1/completions", json={"prompt": [5]}, headers=headers))


async def test_a_huge_body_without_the_token_is_refused_unread(closed: Stack) -> None:
    async with http(closed) as client:
        assert is_refusal(await client.post("/v1/completions", content=b" " * (33 * 2**20)))


async def test_the_openai_package_works_with_the_token(closed: Stack) -> None:
    async with AsyncOpenAI(base_url=f"{closed.url}/v1", api_key=TOKEN, max_retries=0) as client:
        answer = await client.completions.create(model="tiny", prompt=[5, 6], max_tokens=3)
        assert answer.usage is not None
        assert [model.id async for model in client.models.list()] == ["tiny"]
        with pytest.raises(openai.AuthenticationError) as caught:
            await client.with_options(api_key="another").completions.create(model="tiny", prompt=[5])
    assert caught.value.code == "invalid_api_key"


async def test_the_scheme_may_be_written_as_clients_like(closed: Stack) -> None:
    async with http(closed) as client:
        for scheme in ("bearer", "BEARER", "Bearer "):
            answer = await client.get("/v1/models", headers={"Authorization": f"{scheme} {TOKEN}"})
            assert answer.status_code == 200


async def test_the_token_may_come_from_a_file(tmp_path: Path, tiny: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    async with (
        running_stack(tmp_path, "--model", str(tiny), "--experts", "1", API_AUTH_TOKEN_FILE=str(file)) as stack,
        http(stack) as client,
    ):
        assert is_refusal(await client.get("/v1/models"))
        assert (await client.get("/v1/models", headers={"Authorization": f"Bearer {TOKEN}"})).status_code == 200


async def test_a_gateway_in_production_does_not_start_without_a_token(tmp_path: Path, tiny: Path) -> None:
    gateway = await start_service(tmp_path, "gateway", ENV="production", MODEL=str(tiny), PORT="0")
    assert await gateway.ended() == 2
    (line,) = gateway.log.read_text().splitlines()
    assert line.startswith("error: ")
    assert "API_AUTH_TOKEN" in line


async def test_a_stack_in_production_does_not_start_without_a_token(tmp_path: Path, tiny: Path) -> None:
    command = (sys.executable, "-m", "services.cli", "up", "--model", str(tiny), "--port", "0")
    up = await start(tmp_path, "up", *command, ENV="production")
    assert await up.ended() == 2
    (line,) = [line for line in up.log.read_text().splitlines() if line.startswith("error: ")]
    assert "API_AUTH_TOKEN" in line
