"""Who is gone and what nobody serves: by silence, by what asking has proved, and until when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from services.monitor.absences import absences, service_down, shard_without_replica
from services.monitor.observations import Measured
from services.monitor.rules import Key, Reading
from tests.monitor.observing import DEPLOYMENT, NOW, instance, seen, settings

SETTINGS = settings(stale_seconds=5, alert_forget_seconds=3600)
LATE, DOWN = 4.0, 6.0


def down(
    *instances: Measured, lost: Mapping[tuple[str, str], str] | None = None, opened: Mapping[Key, tuple[str, float]]
) -> dict[str, Reading]:
    return {r.subject: r for r in service_down(seen(*instances), lost or {}, SETTINGS, opened)}


def verdicts(*instances: Measured, lost: Mapping[tuple[str, str], str] | None = None) -> dict[str, str]:
    return {subject: r.verdict for subject, r in down(*instances, lost=lost, opened={}).items()}


# -- service_down ----------------------------------------------------------------------------------------------------


def test_silence_is_late_at_first_and_then_down() -> None:
    found = verdicts(instance("expert-1"), instance("expert-2", age=LATE), instance("expert-3", age=DOWN))
    assert found == {"expert-1": "good", "expert-2": "unknown", "expert-3": "bad"}


def test_who_drained_before_it_went_is_not_down() -> None:
    assert verdicts(instance("expert-1", age=DOWN, state="draining")) == {"expert-1": "good"}
    gone = {("expert", "expert-1"): "gone"}
    assert verdicts(instance("expert-1", age=1.2, state="draining"), lost=gone) == {"expert-1": "good"}


def test_who_is_known_to_be_lost_is_down_at_once_and_it_is_said_how() -> None:
    lost = {("expert", "expert-1"): "gone", ("expert", "expert-2"): "stalled"}
    found = down(instance("expert-1", age=1.2), instance("expert-2", age=2.1), lost=lost, opened={})
    assert {r.verdict for r in found.values()} == {"bad"}
    assert "nobody listens" in found["expert-1"].text
    assert "stalled" in found["expert-2"].text
    assert "expert expert-1" in found["expert-1"].text


def test_a_name_that_two_services_share_is_two_subjects() -> None:
    router, worker = instance("router-1", age=DOWN), instance("expert-1")
    shared = Measured(worker.status, 0.5)
    (first, second) = service_down(seen(router, shared), {("gateway", "expert-1"): "gone"}, SETTINGS, {})
    assert {(r.service, r.verdict) for r in (first, second)} == {("router", "bad"), ("expert", "good")}


def test_one_that_came_since_takes_the_place_of_one_that_is_lost() -> None:
    first, second = instance("expert-1", age=DOWN + 2), instance("expert-2", age=DOWN)
    heir = instance("expert-3", started=NOW - 3)
    found = down(first, second, heir, opened={})
    assert {name: r.verdict for name, r in found.items()} == {"expert-1": "good", "expert-2": "bad", "expert-3": "good"}
    assert "expert-3 is in its place" in found["expert-1"].text


def test_nobody_else_takes_its_place() -> None:
    lost = instance("expert-1", age=DOWN)
    for other in (
        instance("expert-2", started=NOW - DOWN - 1),
        instance("expert-2", started=NOW - 3, state="loading"),
        instance("expert-2", started=NOW - 3, deployment="other-00000000"),
        instance("router-2", started=NOW - 3),
    ):
        assert verdicts(lost, other)["expert-1"] == "bad"


def test_who_is_in_no_report_any_more_is_remembered_by_its_alert() -> None:
    opened = {("service_down", "expert", "expert-1"): (DEPLOYMENT, NOW - 600)}
    assert down(instance("expert-2"), opened=opened)["expert-1"].verdict == "bad"
    back = down(instance("expert-1"), opened=opened)
    assert back["expert-1"].verdict == "good"
    replaced = down(instance("expert-2", started=NOW - 300), opened=opened)["expert-1"]
    assert (replaced.verdict, replaced.deployment) == ("good", DEPLOYMENT)
    forgotten = {("service_down", "expert", "expert-1"): (DEPLOYMENT, NOW - 3601)}
    removed = down(instance("expert-2", started=NOW - 9000), opened=forgotten)["expert-1"]
    assert (removed.verdict, "taken as removed" in removed.text) == ("good", True)


def test_alerts_of_other_rules_name_nobody_who_is_down() -> None:
    assert down(opened={("high_latency", "", DEPLOYMENT): (DEPLOYMENT, NOW)}) == {}


# -- shard_without_replica -------------------------------------------------------------------------------------------


def shards(*instances: Measured, lost: Mapping[tuple[str, str], str] | None = None) -> dict[str, str]:
    readings = shard_without_replica(seen(*instances), lost or {}, SETTINGS)
    return {r.subject.removeprefix(f"{DEPLOYMENT}/"): r.verdict for r in readings}


ROUTER = instance("router-1", num_shards=2)


def worker(name: str, *held: int, **more: Any) -> Measured:
    return instance(name, num_shards=2, shards=held, **more)


def test_a_shard_is_served_by_workers_that_are_ready_and_not_lost() -> None:
    assert shards(ROUTER, worker("expert-1", 0), worker("expert-2", 1)) == {"0": "good", "1": "good"}
    assert shards(ROUTER, worker("expert-1", 0)) == {"0": "good", "1": "bad"}
    assert shards(ROUTER, worker("expert-1", 0), worker("expert-2", 1, state="loading"))["1"] == "bad"
    assert shards(ROUTER, worker("expert-1", 0), worker("expert-2", 1, state="draining"))["1"] == "bad"
    assert shards(ROUTER, worker("expert-1", 0), worker("expert-2", 1, age=DOWN))["1"] == "bad"
    assert shards(ROUTER, worker("expert-1", 0), worker("expert-2", 1, age=LATE))["1"] == "good"
    gone = {("expert", "expert-2"): "gone"}
    assert shards(ROUTER, worker("expert-1", 0), worker("expert-2", 1, age=1.2), lost=gone)["1"] == "bad"


def test_a_reading_names_the_shard_and_counts_its_workers() -> None:
    readings = list(shard_without_replica(seen(ROUTER, worker("expert-1", 0), worker("expert-2", 0)), {}, SETTINGS))
    assert [(r.subject, r.value, r.threshold) for r in readings] == [
        (f"{DEPLOYMENT}/0", 2.0, 1.0),
        (f"{DEPLOYMENT}/1", 0.0, 1.0),
    ]
    assert readings[1].text == f"no worker serves shard 1 of {DEPLOYMENT}"


def test_who_needs_a_shard_is_a_router_that_is_ready() -> None:
    one = worker("expert-1", 0)
    assert shards(one) == {"0": "good", "1": "good"}
    assert shards(one, instance("router-1", num_shards=2, state="draining"))["1"] == "good"
    assert shards(one, instance("router-1", num_shards=2, state="draining", age=DOWN))["1"] == "good"
    assert shards(one, instance("router-1", num_shards=2, age=DOWN)) == {"0": "good", "1": "unknown"}
    assert shards(one, instance("router-1", num_shards=2, age=DOWN), instance("router-2", num_shards=2))["1"] == "bad"


def test_deployments_are_looked_at_apart() -> None:
    other = instance("router-2", num_shards=1, deployment="other-00000000")
    readings = shard_without_replica(seen(ROUTER, worker("expert-1", 0, 1), other), {}, SETTINGS)
    assert {r.subject for r in readings if r.verdict == "bad"} == {"other-00000000/0"}


# -- both ------------------------------------------------------------------------------------------------------------

fleets = st.lists(
    st.builds(
        instance,
        st.sampled_from([f"{service}-{n}" for service in ("expert", "router", "gateway") for n in range(3)]),
        age=st.sampled_from([0.5, LATE, DOWN]),
        state=st.sampled_from(["starting", "loading", "ready", "draining"]),
        started=st.sampled_from([NOW - 1000, NOW - 3]),
        deployment=st.sampled_from([DEPLOYMENT, "other-00000000"]),
        num_shards=st.integers(0, 3),
        shards=st.lists(st.integers(0, 3), max_size=3).map(tuple),
    ),
    max_size=6,
    unique_by=lambda m: m.instance,
)


@given(fleets, st.sets(st.sampled_from([f"expert-{n}" for n in range(3)])))
def test_whatever_the_fleet_each_thing_is_said_once(fleet: list[Measured], lost: set[str]) -> None:
    proved = {("expert", name): "gone" for name in lost}
    readings = absences(seen(*fleet), proved, SETTINGS, {})
    assert len({r.key for r in readings}) == len(readings)
    bad = {r.subject for r in readings if r.rule == "service_down" and r.verdict == "bad"}
    silent = {m.instance for m in fleet if m.age == DOWN or (m.service == "expert" and m.instance in lost)}
    assert bad <= silent - {m.instance for m in fleet if m.status.state == "draining"}
    newcomers = [
        m for m in fleet if m.instance not in silent and m.status.state == "ready" and m.status.started > NOW - 10
    ]
    if not newcomers:
        assert bad == silent - {m.instance for m in fleet if m.status.state == "draining"}
