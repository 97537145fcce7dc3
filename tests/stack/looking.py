"""What tests of a stack look at from outside: HTTP, status reports, and the processes behind them."""

from __future__ import annotations

from typing import Any

import httpx
import psutil

from shared.status import Fleet, Status
from tests.running import Stack


def http(stack: Stack, **options: Any) -> httpx.AsyncClient:
    """A client of the stack's gateway without limits of its own."""
    return httpx.AsyncClient(
        base_url=stack.url, timeout=httpx.Timeout(150), limits=httpx.Limits(max_connections=None), **options
    )


async def deployment_of(stack: Stack) -> str:
    async with http(stack) as client:
        return str((await client.get("/health")).json()["deployment"])


def reports(fleet: Fleet, service: str, deployment: str) -> list[Status]:
    """The last reports of a deployment's instances of one service."""
    return [status for status in fleet.live(service) if status.deployment == deployment]


def idle(fleet: Fleet, deployment: str) -> bool:
    """Whether the deployment's routers and gateways say that nothing runs, waits, or holds KV blocks."""
    found = [*reports(fleet, "router", deployment), *reports(fleet, "gateway", deployment)]
    services = {status.service for status in found}
    return services == {"router", "gateway"} and not any(s.running or s.waiting or s.kv_usage for s in found)


def open_files(status: Status) -> int:
    return psutil.Process(status.pid).num_fds()


def threads(status: Status) -> int:
    return psutil.Process(status.pid).num_threads()
