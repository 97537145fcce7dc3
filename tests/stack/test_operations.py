"""What operators look at: health, metrics, the performance report and the small endpoints, against real traffic."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from services.nats_server import free_port
from shared import instrumentation
from shared.discovery import VERSION
from tests.fidelity.cluster import start_cluster
from tests.oracle import make_checkpoint
from tests.running import Running, Stack, Watcher, start_service, wait_until
from tests.stack.looking import deployment_of, http, reports

SERVICES = ("gateway", "router", "expert", "monitor")
NEW_TOKENS = 12
Families = dict[str, Metric]


@pytest_asyncio.fixture(loop_scope="session")
async def client(stack: Stack) -> AsyncIterator[httpx.AsyncClient]:
    async with http(stack) as opened:
        yield opened


async def traffic(client: httpx.AsyncClient, requests: int = 4) -> None:
    body = {"max_tokens": NEW_TOKENS, "ignore_eos": True}
    prompts = ["import os\n", "def read(path):\n", "class A:\n    def", "for x in range("]
    asked = [client.post("/v1/completions", json={**body, "prompt": prompts[n % 4]}) for n in range(requests)]
    for answer in await asyncio.gather(*asked):
        assert answer.status_code == 200


async def scrape(address: str) -> Families:
    """The families at `address`, without the times of creation that the library adds."""
    async with httpx.AsyncClient(timeout=30) as scraper:
        answer = await scraper.get(f"http://{address}/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    return {name: family for name, family in families.items() if not name.endswith("_created")}


def total(families: Families, family: str, sample: str = "", **labels: str) -> float:
    """The sum of a family's samples with these labels."""
    wanted = family + sample
    return sum(
        s.value for s in families[family].samples if s.name == wanted and labels.items() <= dict(s.labels).items()
    )


# -- health -----------------------------------------------------------------------------------------------------------


async def test_health_tells_about_every_part(client: httpx.AsyncClient) -> None:
    async def monitored() -> bool:
        return bool((await client.get("/health")).json()["parts"]["monitor"]["ready"])

    await wait_until(monitored, "the monitor's first report")
    answer = await client.get("/health")
    assert answer.status_code == 200
    body = answer.json()
    assert body["status"] == "ok"
    assert body["model"] == "demo"
    assert set(body["parts"]) >= {"gateway", "bus", "router", "experts", "monitor"}
    assert all(part["ready"] for part in body["parts"].values())
    assert body["parts"]["experts"]["shards"] == 2
    assert body["parts"]["experts"]["missing_shards"] == []
    workers = body["parts"]["experts"]["instances"].values()
    assert {shard for worker in workers for shard in worker["shards"]} == {0, 1}


async def test_health_is_503_while_a_part_is_gone(tmp_path: Path, nats_url: str, watcher: Watcher) -> None:
    path = make_checkpoint(tmp_path / "m", "mixtral")
    cluster = await start_cluster(tmp_path, path, nats_url, 2, workers=("0", "1"))
    name = cluster.deployment.rsplit("-", 1)[0]
    port = free_port()
    common = {"MODEL": str(path), "SERVED_MODEL_NAME": name, "NATS_URL": nats_url}
    gateway = await start_service(tmp_path, "gateway", **common, PORT=str(port))
    everyone: list[Running] = [*cluster.processes, gateway]
    try:
        await cluster.ready(watcher.fleet)
        await wait_until(lambda: reports(watcher.fleet, "gateway", cluster.deployment), "the gateway's report")
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:

            async def status() -> int:
                return (await client.get("/health")).status_code

            async def is_up() -> bool:
                return await status() == 200

            async def is_down() -> bool:
                return await status() == 503

            await wait_until(is_up, "/health to say ok")
            router, *_, worker = cluster.processes
            await worker.kill()
            await wait_until(is_down, "/health to notice that a worker is gone")
            answer = await client.get("/health")
            assert answer.json()["status"] == "unavailable"
            assert answer.json()["parts"]["experts"] == {
                **answer.json()["parts"]["experts"],
                "ready": False,
                "missing_shards": [1],
            }
            assert answer.json()["parts"]["router"]["ready"]
            assert int(answer.headers["retry-after"]) > 0
            assert (await client.get("/live")).status_code == 200
            experts = {"EXPERT_SHARDS": "2", "SHARDS": "1", "LOG_LEVEL": "WARNING"}
            everyone.append(await start_service(tmp_path, "expert", **common, **experts))
            await wait_until(is_up, "/health to notice the new worker")
            await router.stop()
            await wait_until(is_down, "/health to notice that the router is gone")
            assert not (await client.get("/health")).json()["parts"]["router"]["ready"]
        everyone.remove(worker)
        await asyncio.gather(*(running.stop() for running in everyone))
    finally:
        await asyncio.gather(*(running.kill() for running in everyone))


# -- metrics ----------------------------------------------------------------------------------------------------------


async def addresses(watcher: Watcher, deployment: str) -> dict[str, list[str]]:
    def found() -> dict[str, list[str]]:
        fleet = watcher.fleet
        known = {service: reports(fleet, service, deployment) for service in ("gateway", "router", "expert")}
        known["monitor"] = fleet.live("monitor")
        return {service: [status.address for status in statuses] for service, statuses in known.items()}

    await wait_until(lambda: all(found().values()), "a report of every service")
    return found()


async def test_every_service_exports_the_named_families(stack: Stack, watcher: Watcher) -> None:
    expected = {metric.name for metric in instrumentation.REGISTRY.collect()}
    assert expected
    for service, found in (await addresses(watcher, await deployment_of(stack))).items():
        for address in found:
            families = await scrape(address)
            assert families.keys() == expected, service
            assert all(family.documentation for family in families.values())


@pytest.mark.parametrize("family", list(instrumentation.REGISTRY.collect()), ids=lambda family: str(family.name))
def test_metric_names_follow_the_conventions(family: Metric) -> None:
    exported = f"{family.name}_total" if family.type == "counter" else family.name
    assert re.fullmatch(r"moe_[a-z][a-z0-9_]*", exported)
    assert family.type in {"counter", "gauge", "histogram"}
    assert family.documentation
    assert not re.search(r"(_ms|_millis|_milliseconds|_mb|_percent|_total_total|_count|_sum|_bucket)$", exported)
    if family.type == "histogram":
        assert exported.endswith(("_seconds", "_bytes", "_tokens"))
    else:
        assert exported.endswith("_total") == (family.type == "counter")
    if re.search(r"\bbytes\b|memory|weights", family.documentation):
        assert exported.endswith("_bytes")


async def test_traffic_shows_in_the_metrics(client: httpx.AsyncClient, stack: Stack, watcher: Watcher) -> None:
    await traffic(client)
    found = await addresses(watcher, await deployment_of(stack))
    (gateway,) = [await scrape(address) for address in found["gateway"]]
    for family in ("moe_time_to_first_token_seconds", "moe_inter_token_latency_seconds"):
        assert total(gateway, family, "_count", model_name="demo") > 0
        assert total(gateway, family, "_sum", model_name="demo") > 0
    assert total(gateway, "moe_e2e_request_latency_seconds", "_count", model_name="demo") >= 4
    assert total(gateway, "moe_generation_tokens", "_total", model_name="demo") >= 4 * NEW_TOKENS
    assert total(gateway, "moe_request_success", "_total", model_name="demo", finished_reason="length") >= 4
    assert total(gateway, "moe_http_requests", "_total", endpoint="/v1/completions", status="200") >= 4

    (router,) = [await scrape(address) for address in found["router"]]
    for family in ("moe_request_queue_time_seconds", "moe_batch_size_tokens", "moe_step_seconds"):
        assert total(router, family, "_count", model_name="demo") > 0
    assert total(router, "moe_batch_size_tokens", "_sum") > 0
    for layer in range(4):
        assert total(router, "moe_dispatch_seconds", "_count", layer=str(layer)) > 0
        assert total(router, "moe_dispatch_seconds", "_sum", layer=str(layer)) > 0

    async def exported() -> bool:
        families = await scrape(found["router"][0])
        return all(total(families, "moe_expert_tokens", "_total", layer=str(layer)) > 0 for layer in range(4))

    await wait_until(exported, "the router to export its experts' tokens")
    router = await scrape(found["router"][0])
    labels = {(s.labels["layer"], s.labels["expert"]) for s in router["moe_expert_tokens"].samples}
    assert labels == {(str(layer), str(expert)) for layer in range(4) for expert in range(8)}

    workers = [await scrape(address) for address in found["expert"]]
    for shard in range(2):
        assert sum(total(worker, "moe_expert_calls", "_total", shard=str(shard)) for worker in workers) > 0
        assert sum(total(w, "moe_expert_compute_seconds", "_count", shard=str(shard)) for w in workers) > 0
        assert sum(total(worker, "moe_shard_weights_bytes", shard=str(shard)) for worker in workers) > 0

    (monitor,) = [await scrape(address) for address in found["monitor"]]
    for service in SERVICES:
        assert total(monitor, "moe_instances", service=service) > 0
    assert total(monitor, "moe_shard_replicas", shard="0") > 0


async def test_paths_of_strangers_make_no_new_labels(client: httpx.AsyncClient, stack: Stack) -> None:
    for number in range(5):
        assert (await client.get(f"/stranger/{number}")).status_code == 404
    families = await scrape(stack.url.removeprefix("http://"))
    endpoints = {s.labels["endpoint"] for s in families["moe_http_requests"].samples}
    assert "other" in endpoints
    assert not any("stranger" in endpoint for endpoint in endpoints)


# -- the performance report -------------------------------------------------------------------------------------------


async def test_the_performance_report_is_measured(client: httpx.AsyncClient) -> None:
    before = (await client.get("/performance-report")).json()
    await traffic(client, 3)
    report = (await client.get("/performance-report")).json()
    assert report["model"] == "demo"
    assert report["totals"]["finished"] - before["totals"]["finished"] == 3
    assert report["totals"]["generation_tokens"] - before["totals"]["generation_tokens"] == 3 * NEW_TOKENS
    assert report["totals"]["prompt_tokens"] > before["totals"]["prompt_tokens"]
    assert report["throughput"]["output_tokens_per_second"] > 0
    for name in ("time_to_first_token", "inter_token", "end_to_end"):
        latency = report["latency"][name]
        assert latency["count"] >= 3
        assert 0 < latency["p50_ms"] <= latency["p95_ms"] <= latency["p99_ms"]
    assert report["queue"] == {"running": 0, "waiting": 0}
    assert isinstance(report["recommendations"], list)

    def tokens(said: dict[str, Any]) -> list[int]:
        return [sum(layer["tokens"]) for layer in said["experts"]]

    async def counted() -> bool:
        now = (await client.get("/performance-report")).json()
        return all(after > earlier for after, earlier in zip(tokens(now), tokens(before), strict=True))

    await wait_until(counted, "the router's report of its experts' tokens")
    for layer in (await client.get("/performance-report")).json()["experts"]:
        assert len(layer["tokens"]) == 8
        assert 0 < layer["entropy"] <= 1
        assert layer["imbalance"] >= 1


# -- the small endpoints ----------------------------------------------------------------------------------------------


async def test_small_endpoints_answer(client: httpx.AsyncClient) -> None:
    assert (await client.get("/live")).json() == {"status": "ok"}
    assert (await client.get("/version")).json() == {"version": VERSION}
    assert (await client.get("/load")).json() == {"running": 0, "waiting": 0}
    (model,) = (await client.get("/v1/models")).json()["data"]
    assert model["id"] == "demo"
    assert model["max_model_len"] == 1024
    assert (await client.get("/v1/models/demo")).json() == model
    assert (await client.get("/v1/models/other")).status_code == 404
    assert (await client.get("/docs")).status_code == 200


@pytest.mark.parametrize("text", ["import os\n", "", "naïve € 𝄞", "a  b\t\n", "<|endoftext|>"])
async def test_tokenizing_and_back_gives_the_text(client: httpx.AsyncClient, text: str) -> None:
    said = (await client.post("/tokenize", json={"prompt": text})).json()
    assert said["count"] == len(said["tokens"])
    assert said["max_model_len"] == 1024
    back = (await client.post("/detokenize", json={"tokens": said["tokens"]})).json()
    assert back == {"prompt": text}


async def test_the_description_names_every_endpoint(client: httpx.AsyncClient) -> None:
    description = (await client.get("/openapi.json")).json()
    assert description["openapi"].startswith("3.")
    assert description["info"] == {"title": "OpenMoE", "version": VERSION}
    endpoints = {
        *("/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/moe/forward", "/v1/moe/route", "/health"),
        *("/live", "/version", "/load", "/metrics", "/performance-report", "/tokenize", "/detokenize"),
    }
    assert endpoints <= description["paths"].keys()
    for path in ("/v1/completions", "/v1/chat/completions"):
        schema = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        name = schema["$ref"].rsplit("/", 1)[1]
        assert "temperature" in description["components"]["schemas"][name]["properties"]


async def test_every_answer_carries_the_requests_id(client: httpx.AsyncClient) -> None:
    for path in ("/health", "/nowhere", "/v1/models/other"):
        assert (await client.get(path, headers={"X-Request-Id": "mine-1"})).headers["x-request-id"] == "mine-1"
        assert (await client.get(path)).headers["x-request-id"]
    hostile = await client.get("/live", headers={"X-Request-Id": "a b;c" * 50})
    assert re.fullmatch(r"[0-9a-f]{32}", hostile.headers["x-request-id"])
