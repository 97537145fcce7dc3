"""Which shards nobody serves."""

from __future__ import annotations

from typing import Any

from services.monitor.findings import shards_missing
from shared.status import Status


def status(service: str, instance: str, state: str = "ready", **more: Any) -> Status:
    return Status(service=service, instance=instance, state=state, **{"deployment": "d", **more})  # type: ignore[arg-type]


def router(instance: str = "r", **more: Any) -> Status:
    return status("router", instance, **{"num_shards": 2, **more})


def worker(instance: str, *shards: int, state: str = "ready", **more: Any) -> Status:
    return status("expert", instance, state, **{"shards": shards, "num_shards": 2, **more})


def test_a_shard_that_no_ready_worker_serves_is_missing() -> None:
    assert shards_missing([router(), worker("a", 0), worker("b", 1), status("gateway", "g")]) == {"d": []}
    assert shards_missing([router(), worker("a", 0), status("gateway", "g")]) == {"d": [1]}
    assert shards_missing([]) == {}


def test_a_worker_that_is_not_ready_serves_nothing() -> None:
    for state in ("starting", "loading", "draining"):
        assert shards_missing([router(), worker("a", 0, 1, state=state)]) == {"d": [0, 1]}


def test_without_a_ready_router_nobody_needs_the_shards() -> None:
    assert shards_missing([router(state="loading"), status("gateway", "g")]) == {}


def test_deployments_are_looked_at_apart() -> None:
    now = [router(), worker("a", 0, 1), router("r2", deployment="e"), worker("c", 1, deployment="e")]
    assert shards_missing(now) == {"d": [], "e": [0]}
