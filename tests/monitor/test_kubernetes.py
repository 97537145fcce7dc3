"""The Kubernetes executor against a real HTTP server that answers as the API's reference says.

It is no Kubernetes: what is tested is what is sent, and what is made of each documented answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from services.monitor.executors.kubernetes import ATTEMPTS, KubernetesExecutor
from shared.errors import MoeError
from tests.benchmark.servers import serving, whole

REASONS = {200: "OK", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 409: "Conflict", 503: "Unavailable"}


@dataclass
class Api:
    """One namespace's Deployments, as the API shows their scale."""

    replicas: dict[str, int]
    account: Path
    url: str = ""
    token: str = "first"
    refusals: list[int] = field(default_factory=list)
    """Statuses of the next answers, before it does as asked."""
    asked: list[str] = field(default_factory=list)
    """The first line of each request."""

    def write_token(self, token: str) -> None:
        (self.account / "token").write_text(f"{token}\n")

    def executor(self) -> KubernetesExecutor:
        return KubernetesExecutor({"expert": "moe-expert", "router": "moe-router"}, self.url, self.account)

    async def answer(self, request: bytes, writer: asyncio.StreamWriter) -> None:
        head, _, body = request.partition(b"\r\n\r\n")
        line, *headers = head.decode().split("\r\n")
        self.asked.append(line)
        method, path, _ = line.split(" ")
        status, said = self._said(method, path, dict(h.split(": ", 1) for h in headers), body)
        writer.write(whole(json.dumps(said).encode(), f"{status} {REASONS[status]}"))

    def _said(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, object]]:
        if headers.get("authorization") != f"bearer {self.token}":  # the server gives heads in lower case
            return _status(401)
        if self.refusals:
            return _status(self.refusals.pop(0))
        prefix, suffix = "/apis/apps/v1/namespaces/models/deployments/", "/scale"
        name = path.removeprefix(prefix).removesuffix(suffix)
        if path != f"{prefix}{name}{suffix}" or name not in self.replicas:
            return _status(404)
        if method == "patch":
            assert headers["content-type"] == "application/merge-patch+json"
            self.replicas[name] = json.loads(body)["spec"]["replicas"]
        spec = {"replicas": self.replicas[name]} if self.replicas[name] else {}
        return 200, {"kind": "Scale", "apiVersion": "autoscaling/v1", "spec": spec, "status": {"replicas": 1}}


def _status(code: int) -> tuple[int, dict[str, object]]:
    return code, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code}


@contextlib.asynccontextmanager
async def kubernetes(folder: Path) -> AsyncIterator[tuple[Api, KubernetesExecutor]]:
    api = Api({"moe-expert": 2, "moe-router": 0}, folder)
    (folder / "namespace").write_text("models")
    api.write_token("first")
    async with serving(api.answer) as url:
        api.url = url
        executor = api.executor()
        try:
            yield api, executor
        finally:
            await executor.close()


async def refusal(executor: KubernetesExecutor) -> str:
    with pytest.raises(MoeError) as caught:
        await executor.scale("expert", 3, "test")
    assert caught.value.code == "scaling_failed"
    return caught.value.message


async def test_it_reads_and_patches_the_scale_of_a_deployment(tmp_path: Path) -> None:
    async with kubernetes(tmp_path) as (api, executor):
        assert await executor.counts() == {"expert": 2, "router": 0}
        assert "5" in await executor.scale("expert", 5, "load")
        assert api.replicas == {"moe-expert": 5, "moe-router": 0}
        assert await executor.counts() == {"expert": 5, "router": 0}
    assert api.asked[2] == "patch /apis/apps/v1/namespaces/models/deployments/moe-expert/scale http/1.1"


@pytest.mark.parametrize("status", [401, 409, 503])
async def test_what_may_pass_is_tried_again(tmp_path: Path, status: int) -> None:
    async with kubernetes(tmp_path) as (api, executor):
        api.refusals = [status]
        await executor.scale("expert", 3, "load")
        assert api.replicas["moe-expert"] == 3
        assert len(api.asked) == 2


async def test_a_token_that_was_renewed_is_read_anew(tmp_path: Path) -> None:
    async with kubernetes(tmp_path) as (api, executor):
        await executor.counts()
        api.token = "second"
        api.write_token("second")
        await executor.scale("expert", 3, "load")
        assert api.replicas["moe-expert"] == 3


@pytest.mark.parametrize(("status", "hint"), [(403, "get and patch"), (404, "SCALING_TARGETS")])
async def test_what_will_not_pass_is_said_at_once_with_what_to_do(tmp_path: Path, status: int, hint: str) -> None:
    async with kubernetes(tmp_path) as (api, executor):
        api.refusals = [status]
        text = await refusal(executor)
        assert f"HTTP {status}" in text
        assert hint in text
        assert len(api.asked) == 1


async def test_a_conflict_that_stays_is_given_up(tmp_path: Path) -> None:
    async with kubernetes(tmp_path) as (api, executor):
        api.refusals = [409] * ATTEMPTS
        assert "somebody else" in await refusal(executor)
        assert len(api.asked) == ATTEMPTS
        assert api.replicas["moe-expert"] == 2


async def test_an_api_that_is_not_there_is_a_typed_error(tmp_path: Path) -> None:
    async with kubernetes(tmp_path) as (api, _):
        pass
    gone = api.executor()
    try:
        assert "Kubernetes" in await refusal(gone)
    finally:
        await gone.close()


async def test_without_an_account_it_says_which_file_is_missing(tmp_path: Path) -> None:
    async with kubernetes(tmp_path) as (_, executor):
        (tmp_path / "token").unlink()
        assert str(tmp_path / "token") in await refusal(executor)


async def test_an_answer_that_is_no_scale_is_a_typed_error(tmp_path: Path) -> None:
    async def answer(_request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(whole(b"<html>hello</html>"))

    (tmp_path / "namespace").write_text("models")
    (tmp_path / "token").write_text("x")
    async with serving(answer) as url:
        executor = KubernetesExecutor({"expert": "moe-expert"}, url, tmp_path)
        try:
            assert "no Scale" in await refusal(executor)
        finally:
            await executor.close()


async def test_a_service_that_is_not_named_is_not_scaled(tmp_path: Path) -> None:
    executor = KubernetesExecutor({"expert": "moe-expert"}, "http://127.0.0.1:9", tmp_path)
    with pytest.raises(MoeError, match="SCALING_TARGETS"):
        await executor.scale("router", 2, "load")
