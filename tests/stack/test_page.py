"""The monitor's page of a running stack: what `openmoe up` prints leads to what really runs."""

from __future__ import annotations

import httpx

from tests.running import Stack, wait_until

SOON = 30.0


async def test_up_prints_where_the_page_is_and_it_shows_the_stack(stack: Stack) -> None:
    url = next(line.split()[1] for line in stack.log.read_text().splitlines() if line.startswith("monitor http://"))
    async with httpx.AsyncClient(timeout=30, trust_env=False) as http:

        async def counted() -> bool:
            await http.post(f"{stack.url}/v1/completions", json={"prompt": "import ", "max_tokens": 4})
            report = (await http.get(f"{url}/state.json")).json()["report"]
            first = report["latency"].get("gateway", {}).get("time_to_first_token", {})
            layers = [layer for d in report["deployments"] for layer in d["layers"] if any(layer["tokens"])]
            return bool(report["throughput"]["output_tokens_per_second"] and first.get("p95_ms") and layers)

        await wait_until(counted, "the completions to be shown", SOON)
        html = (await http.get(url)).text
        report = (await http.get(f"{stack.url}/performance-report")).json()
    instances = report["fleet"]["instances"]
    assert all(i["instance"] in html for i in instances)
    services = {i["service"] for i in instances}
    assert services >= {"gateway", "router", "expert", "monitor"}
