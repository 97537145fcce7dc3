"""See how it runs: health of every part, Prometheus metrics, the performance report."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.running import Stack

BODY = {"prompt": "import ", "max_tokens": 4}


async def test_health_names_every_part(stack: Stack) -> None:
    async with httpx.AsyncClient(base_url=stack.url, timeout=30) as http:
        answer = await http.get("/health")

    assert answer.status_code == 200
    health = answer.json()
    assert health["status"] == "ok"
    assert all(part["ready"] for part in health["parts"].values())
    assert set(health["parts"]) == {"gateway", "bus", "router", "experts", "monitor"}
    assert health["parts"]["experts"]["missing_shards"] == []


async def test_metrics_count_generated_tokens(stack: Stack) -> None:
    async def generated(http: httpx.AsyncClient) -> float:
        text = (await http.get("/metrics")).text
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
        return sum(s.value for s in samples if s.name == "moe_generation_tokens_total")

    async with httpx.AsyncClient(base_url=stack.url, timeout=30) as http:
        before = await generated(http)
        usage = (await http.post("/v1/completions", json=BODY)).json()["usage"]
        after = await generated(http)

    assert after - before == usage["completion_tokens"]


async def test_the_performance_report_tells_latencies_and_the_experts_use(stack: Stack) -> None:
    async with httpx.AsyncClient(base_url=stack.url, timeout=30) as http:
        await http.post("/v1/completions", json=BODY)
        report = (await http.get("/performance-report")).json()

    assert report["throughput"]["output_tokens_per_second"] > 0
    assert report["latency"]["time_to_first_token"]["p50_ms"] > 0
    assert len(report["experts"]) == 4


async def test_a_wrong_request_is_told_what_is_wrong(stack: Stack) -> None:
    async with httpx.AsyncClient(base_url=stack.url, timeout=30) as http:
        answer = await http.post("/v1/completions", json={"prompt": "a", "temperature": -1})

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "temperature"
