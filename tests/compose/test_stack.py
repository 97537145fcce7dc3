"""The whole stack in containers: it answers, scales under load, outlives restarts, and can be followed and measured."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from shared.kernels.build import PREBUILT_NEEDS
from tests.compose.project import REPOSITORY, SERVICES, Project, command, succeeded
from tests.running import wait_until

DASHBOARDS = sorted((REPOSITORY / "deploy" / "grafana" / "dashboards").glob("*.json"))
RULES = sorted((REPOSITORY / "deploy" / "prometheus" / "rules").glob("*.yml"))
BODY: dict[str, Any] = {"prompt": "class Stack:\n", "max_tokens": 16, "temperature": 0, "ignore_eos": True}


async def test_it_answers_health_completions_streams_and_layers(project: Project, client: httpx.AsyncClient) -> None:
    health = (await client.get("/health")).json()
    assert health["status"] == "ok"
    assert all(part["ready"] for part in health["parts"].values()), health
    said = await succeeded(sys.executable, "-m", "services.cli", "smoke", project.url, folder=REPOSITORY)
    assert "failed" not in said
    hidden = [[0.1] * 256, [-0.2] * 256]
    answer = (await client.post("/v1/moe/forward", json={"layer": 1, "hidden_states": hidden})).json()
    assert [len(row) for row in answer["hidden_states"]] == [256, 256]
    assert all(math.isfinite(x) for row in answer["hidden_states"] for x in row)


async def test_the_monitors_page_shows_the_containers_on_this_machine(project: Project) -> None:
    async with httpx.AsyncClient(base_url=project.monitor_url, timeout=30, trust_env=False) as http:

        async def services() -> set[str]:
            report = (await http.get("/state.json")).json()["report"] or {"instances": []}
            return {instance["service"] for instance in report["instances"]}

        async def complete() -> bool:
            return await services() >= set(SERVICES)

        await wait_until(complete, "every service on the monitor's page")
        assert "Every shard is served" in (await http.get("/")).text


async def test_a_stream_arrives_token_by_token_through_nginx(client: httpx.AsyncClient) -> None:
    body = {**BODY, "prompt": "# as it comes\n", "max_tokens": 64, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        reads = [chunk async for chunk in answer.aiter_bytes()]
    assert reads[-1].rstrip().endswith(b"data: [DONE]")
    assert len(reads) > 16, "nginx gathered the stream"


async def test_a_nats_client_in_another_container_generates_and_calls_an_expert(project: Project) -> None:
    script = Path(__file__).parent / "bus_client.py"
    said = await succeeded(
        *("docker", "run", "--rm", "--network", f"{project.name}_bus", "--entrypoint", "python"),
        *("--volume", f"{script}:/client/bus_client.py:ro", "--workdir", "/client", "openmoe:test", "bus_client.py"),
    )
    answer = json.loads(said.splitlines()[-1])
    assert len(answer["token_ids"]) == 8
    assert answer["finish_reason"] == "length"
    assert answer["expert"] == ["float32", [1, 256]]


async def test_a_request_can_be_followed_through_the_logs(project: Project, client: httpx.AsyncClient) -> None:
    name = "followed-through-the-logs"
    answer = await client.post("/v1/completions", json={**BODY, "prompt": "# followed"}, headers={"X-Request-Id": name})
    assert answer.headers["x-request-id"] == name
    seen = {}
    for service in (*SERVICES[:3], "nginx"):
        seen[service] = [e["event"] for e in await project.events(service) if e.get("request_id") == name]
    assert "http.request" in seen["nginx"]
    assert "http.request" in seen["gateway"]
    assert {"generation.accepted", "generation.finished"} <= set(seen["router"])
    assert "request.served" in seen["expert"]
    for event in await project.events("monitor"):
        assert {"event", "level", "service", "timestamp"} <= set(event)


async def test_the_images_kernels_are_used_where_the_cpu_runs_them(project: Project) -> None:
    runs = all(torch.cpu.get_capabilities().get(name) for name in PREBUILT_NEEDS)
    for service in ("router", "expert"):
        (decision, *_) = [e for e in await project.events(service) if e["event"] == f"{service}.compilation"]
        assert decision["compiled"] is runs or "itself" in decision["reason"], decision


async def test_it_runs_as_nobody_on_a_file_system_that_cannot_be_written(project: Project) -> None:
    probe = "import os; print(os.getuid()); open('/app/x', 'w')"
    for service in SERVICES:
        code, said = await project.attempt("exec", "-T", service, "python", "-c", probe)
        assert code == 1
        assert "10001" in said
        assert "Read-only file system" in said
    history = await succeeded("docker", "history", "--no-trunc", "--format", "{{.CreatedBy}}", "openmoe:test")
    assert not re.search(r"(?i)token=|secret|password", history)


async def test_a_greedy_answer_is_known_the_second_time(client: httpx.AsyncClient) -> None:
    body = {**BODY, "prompt": "# asked twice\n"}
    texts = [(await client.post("/v1/completions", json=body)).json()["choices"][0]["text"] for _ in range(3)]
    assert len(set(texts)) == 1
    assert (await client.get("/performance-report")).json()["answer_cache"]["hits"] >= 1


async def test_scaling_up_and_down_fails_no_request(project: Project, client: httpx.AsyncClient) -> None:
    async def workers() -> int:
        return len((await client.get("/health")).json()["parts"]["experts"]["instances"])

    async def scraped(expert: int, router: int, gateway: int) -> bool:
        (found,) = await project.prometheus('count by (service) (up{job="openmoe"} == 1)')
        counts = {series["metric"]["service"]: int(series["value"][1]) for series in found}
        return counts == {"expert": expert, "router": router, "gateway": gateway, "monitor": 1}

    async with project.under_load():
        await project.scale(expert=4, router=2, gateway=2)
        assert await workers() == 4
        await wait_until(lambda: scraped(4, 2, 2), "Prometheus to find all instances")
        await project.scale(expert=2, router=1, gateway=1)
        assert await workers() <= 4
        await wait_until(lambda: scraped(2, 1, 1), "Prometheus to forget those that went")
    health = (await client.get("/health")).json()["parts"]["experts"]
    assert (health["missing_shards"], health["shards"]) == ([], 4)


@pytest.mark.parametrize("service", ["redis", "monitor"])
async def test_a_restart_fails_no_request(project: Project, client: httpx.AsyncClient, service: str) -> None:
    part = {"redis": "cache"}.get(service, service)
    async with project.under_load():
        await project.compose("restart", service)

        async def back() -> bool:
            return bool((await client.get("/health")).json()["parts"][part]["ready"])

        await wait_until(back, f"{service} to be back")


async def test_requests_are_served_while_redis_is_stopped(project: Project, client: httpx.AsyncClient) -> None:
    await project.compose("stop", "redis")
    try:
        for number in range(3):
            answer = await client.post("/v1/completions", json={**BODY, "prompt": f"# without {number}\n"})
            assert answer.status_code == 200, answer.text
        health = await client.get("/health")
        assert (health.status_code, health.json()["parts"]["cache"]["ready"]) == (200, False)
        said = [e for e in await project.events("gateway") if e["event"] == "cache.unavailable"]
        assert said
        assert said[-1]["reason"]
    finally:
        await project.compose("start", "redis")


def queries() -> list[tuple[str, str]]:
    """(where, query) of every dashboard's panels and every rule; of an alert, what it compares with its limit."""
    found = []
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            found += [(f"{path.stem}: {panel['title']}", target["expr"]) for target in panel.get("targets", [])]
    for path in RULES:
        for rule in re.findall(r"^ +expr: (\|\n(?: {10}.*\n)+|.*\n)", path.read_text(), re.MULTILINE):
            expression = " ".join(rule.removeprefix("|").split())
            found.append((path.stem, re.sub(r" (==|>|<) [0-9.]+$", "", expression)))
    return found


async def test_every_dashboard_and_rule_has_data(project: Project, client: httpx.AsyncClient) -> None:
    asked = queries()
    assert len(asked) > 60
    missing: list[str] = []

    async def complete() -> bool:
        answer = await client.post("/v1/completions", json={**BODY, "prompt": "# for the dashboards\n"})
        assert answer.status_code == 200
        missing.clear()
        results = await project.prometheus(*(query for _, query in asked))
        for (where, query), result in zip(asked, results, strict=True):
            values = [float(series["value"][1]) for series in result]
            # An endpoint or a shard that nobody used in the last minute has no percentile; another must have one.
            if all(math.isnan(value) for value in values):
                missing.append(f"{where}: {query} gave {values}")
        return not missing

    async with project.under_load(rate=2):
        with contextlib.suppress(AssertionError):
            await wait_until(complete, "every query to give data", 60)
    assert not missing


async def test_another_checkpoint_is_a_folder_and_a_variable(project: Project, tmp_path: Path) -> None:
    """In a second stack beside the first, with a token from the environment and no cache."""
    shutil.copytree(REPOSITORY / "models" / "demo", tmp_path / "my-checkpoint")
    for path in (tmp_path, tmp_path / "my-checkpoint"):
        path.chmod(0o755)  # pytest's folders are for their owner only, containers run as another user
    other = Project(project.folder, MODEL=str(tmp_path / "my-checkpoint"), EXPERT_SHARDS="2", WORKERS="1")
    other.settings |= {"ENV": "production", "API_AUTH_TOKEN": "a-token-of-ours", "ENABLE_CACHING": "false"}
    try:
        await other.compose("up", "-d", "--wait", "nginx")
        async with other.http() as http:
            assert (await http.get("/v1/models")).status_code == 401
            http.headers["Authorization"] = "Bearer a-token-of-ours"
            (model,) = (await http.get("/v1/models")).json()["data"]
            assert model["id"] == "my-checkpoint"
            answer = await http.post("/v1/completions", json={**BODY, "model": "my-checkpoint"})
            assert answer.json()["usage"]["completion_tokens"] == BODY["max_tokens"]
            parts = (await http.get("/health")).json()["parts"]
        assert (parts["experts"]["shards"], len(parts["experts"]["instances"])) == (2, 1)
        assert "cache" not in parts
    finally:
        await other.down()
    assert await other.leftovers() == []


async def test_the_rules_do_what_their_tests_say(project: Project) -> None:
    config = f"{project.folder / 'deploy' / 'prometheus'}:/etc/prometheus:ro"
    image = next(i for i in (await project.compose("config", "--images")).split() if i.startswith("prom/"))
    promtool = ("docker", "run", "--rm", "--volume", config, "--entrypoint", "promtool", image)
    assert "SUCCESS" in await succeeded(*promtool, "check", "config", "/etc/prometheus/prometheus.yml")
    assert "SUCCESS" in await succeeded(*promtool, "test", "rules", "/etc/prometheus/tests/alerts.yml")


async def test_promtool_is_able_to_say_no(project: Project, tmp_path: Path) -> None:
    """The check above would be worth nothing if the image's promtool accepted anything."""
    wrong = tmp_path / "wrong.yml"
    wrong.write_text("rule_files: [nowhere.yml]\nscrape_configs: [{job: 1}]\n")
    image = next(i for i in (await project.compose("config", "--images")).split() if i.startswith("prom/"))
    line = ("docker", "run", "--rm", "--volume", f"{wrong}:/wrong.yml:ro", "--entrypoint", "promtool", image)
    code, _ = await command(*line, "check", "config", "/wrong.yml")
    assert code != 0
