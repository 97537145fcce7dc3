"""What the monitor finds wrong, from two looks at the fleet."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from services.monitor.findings import findings
from shared.status import Status

STATES = ("starting", "loading", "ready", "draining")


def status(service: str, instance: str, state: str = "ready", **more: Any) -> Status:
    return Status(service=service, instance=instance, state=state, **{"deployment": "d", **more})  # type: ignore[arg-type]


def router(instance: str = "r", **more: Any) -> Status:
    return status("router", instance, **{"num_shards": 2, **more})


def worker(instance: str, *shards: int, state: str = "ready", **more: Any) -> Status:
    return status("expert", instance, state, **{"shards": shards, "num_shards": 2, **more})


def kinds(before: list[Status], now: list[Status]) -> list[tuple[str, str]]:
    return [(f.kind, f.subject) for f in findings(before, now)]


HEALTHY = [router(), worker("a", 0), worker("b", 1), status("gateway", "g")]


def test_a_healthy_fleet_has_no_findings() -> None:
    assert kinds(HEALTHY, HEALTHY) == []
    assert kinds([], HEALTHY) == []
    assert kinds([], []) == []


def test_an_instance_that_falls_silent_is_down() -> None:
    (found,) = findings(HEALTHY, HEALTHY[:-1])
    assert (found.kind, found.subject) == ("service_down", "g")
    assert "gateway g" in found.text


def test_an_instance_that_drained_before_it_went_is_not_down() -> None:
    assert kinds([*HEALTHY, router("old", state="draining")], HEALTHY) == []


def test_an_instance_that_comes_back_under_another_name_was_down_all_the_same() -> None:
    assert kinds(HEALTHY, [*HEALTHY[:-1], status("gateway", "g2")]) == [("service_down", "g")]


def test_services_that_share_an_instance_name_are_told_apart() -> None:
    before = [router("node-1"), worker("a", 0, 1), status("gateway", "node-1")]
    assert kinds(before, before[:2]) == [("service_down", "node-1")]


def test_a_shard_that_no_ready_worker_serves_is_found() -> None:
    (found,) = findings(HEALTHY[:2], HEALTHY[:2])
    assert (found.kind, found.subject) == ("shard_without_replica", "d/1")
    assert "shard 1 of d" in found.text


def test_a_worker_that_is_not_ready_serves_nothing() -> None:
    for state in ("starting", "loading", "draining"):
        now = [router(), worker("a", 0, 1, state=state)]
        assert kinds(now, now) == [("shard_without_replica", "d/0"), ("shard_without_replica", "d/1")]


def test_a_lost_worker_is_told_with_the_shards_that_it_leaves_alone() -> None:
    assert kinds(HEALTHY, [HEALTHY[0], HEALTHY[1], HEALTHY[3]]) == [
        ("service_down", "b"),
        ("shard_without_replica", "d/1"),
    ]


def test_without_a_ready_router_nobody_needs_the_shards() -> None:
    now = [router(state="loading"), status("gateway", "g")]
    assert kinds(now, now) == []


def test_deployments_are_looked_at_apart() -> None:
    now = [router(), worker("a", 0, 1), router("r2", deployment="e"), worker("c", 1, deployment="e")]
    assert kinds(now, now) == [("shard_without_replica", "e/0")]


@st.composite
def fleets(draw: st.DrawFn) -> list[Status]:
    return [
        status(
            ("router", "expert", "gateway")[number % 3],
            f"i{number}",
            draw(st.sampled_from(STATES)),
            deployment=draw(st.sampled_from(["d", "e"])),
            num_shards=draw(st.integers(0, 4)),
            shards=tuple(draw(st.lists(st.integers(0, 5), max_size=4))),
        )
        for number in draw(st.lists(st.integers(0, 8), unique=True))
    ]


@settings(deadline=None)
@given(fleets(), fleets())
def test_whatever_the_fleet_each_thing_is_said_once(before: list[Status], now: list[Status]) -> None:
    found = kinds(before, now)
    assert len(found) == len(set(found))
    present = {s.instance for s in now}
    down = {subject for kind, subject in found if kind == "service_down"}
    assert down == {s.instance for s in before if s.instance not in present and s.state != "draining"}
    # Looking twice at the same fleet finds nobody down.
    assert not any(kind == "service_down" for kind, _ in kinds(now, now))
