"""METRICS=off: nothing is counted, nothing breaks."""

from __future__ import annotations

import asyncio
import contextlib
import functools
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
    async with contextlib.AsyncExitStack() as running:
        client = await running.enter_async_context(httpx.AsyncClient(trust_env=False))
        urls: dict[str, str] = {}
        for metrics in ("off", "on"):
            port = free_port()
            settings = {"METRICS": metrics, "METRICS_PORT": str(port), "INSTANCE": f"monitor-{metrics}"}
            monitor = await start_service(tmp_path, "monitor", NATS_URL=nats_url, **settings)
            running.push_async_callback(monitor.stop)
            urls[metrics] = f"http://127.0.0.1:{port}"

        async def healthy(metrics: str) -> bool:
            try:
                return (await client.get(f"{urls[metrics]}/health")).status_code == 200
            except httpx.TransportError:
                return False

        async def counted(metrics: str) -> list[str]:
            text = (await client.get(f"{urls[metrics]}/metrics")).text
            return [line for line in text.splitlines() if line.startswith("moe_instances{")]

        for metrics in urls:
            await wait_until(functools.partial(healthy, metrics), f"the monitor ({metrics}) to be ready", 30)
        await wait_until(lambda: counted("on"), "a monitor to count instances", 30)
        await wait_until(lambda: healthy("off"), "the other to answer still", 5)
        assert not await counted("off")
        assert "# TYPE moe_instances gauge" in (await client.get(f"{urls['off']}/metrics")).text
