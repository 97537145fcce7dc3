"""METRICS=off: nothing is counted, nothing breaks."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import httpx

from services.nats_server import free_port
from tests.running import start_service, wait_until

SCRIPT = """
import prometheus_client
from shared import instrumentation as i

before = i.HTTP_REQUESTS.labels("a", "POST", "200")
before.inc()
i.turn_off()
before.inc()
i.HTTP_REQUESTS.labels("b", "POST", "200").inc()
i.HTTP_SECONDS.labels(endpoint="b").observe(1)
i.KV_CACHE_USAGE.labels("m").set(2)
i.BUS_DROPPED.inc(3)
i.INSTANCES.clear()
others = prometheus_client.Counter("others", "of somebody else")
others.inc()
value = i.REGISTRY.get_sample_value
print(value("moe_http_requests_total", {"endpoint": "a", "method": "POST", "status": "200"}))
print(value("moe_http_requests_total", {"endpoint": "b", "method": "POST", "status": "200"}))
print(value("moe_bus_dropped_messages_total"))
print(prometheus_client.REGISTRY.get_sample_value("others_total"))
"""


async def test_metrics_that_are_off_count_nothing_and_leave_other_libraries_alone() -> None:
    # In a process of its own, as it cannot be undone.
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["1.0", "None", "0.0", "1.0"]


async def test_the_setting_turns_a_service_s_metrics_off(nats_url: str, tmp_path: Path) -> None:
    counted: dict[str, bool] = {}
    for metrics in ("on", "off"):
        port = free_port()
        monitor = await start_service(
            tmp_path, "monitor", NATS_URL=nats_url, METRICS_PORT=str(port), METRICS=metrics, INSTANCE=f"m-{metrics}"
        )
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:

                async def ready(client: httpx.AsyncClient = client) -> bool:
                    try:
                        return (await client.get("/health")).status_code == 200
                    except httpx.TransportError:
                        return False

                async def sees_itself(client: httpx.AsyncClient = client) -> bool:
                    return 'moe_instances{service="monitor"' in (await client.get("/metrics")).text

                await wait_until(ready, "the monitor to be ready", 30)
                if metrics == "on":
                    await wait_until(sees_itself, "the monitor to count itself", 30)
                counted[metrics] = await sees_itself()
                assert "moe_instances" in (await client.get("/metrics")).text
        finally:
            await monitor.stop()
    assert counted == {"on": True, "off": False}
