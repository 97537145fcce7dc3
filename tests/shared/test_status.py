"""What the fleet's reports add up to: who lives, which shards are served."""

from __future__ import annotations

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg

from shared import subjects, wire
from shared.status import STALE_SECONDS, Fleet, State, Status

D = "demo-3f2a91bc"


def worker(instance: str, *shards: int, state: State = "ready", deployment: str = D) -> Status:
    return Status(service="expert", instance=instance, deployment=deployment, state=state, shards=shards)


def names(reports: list[Status]) -> list[str]:
    return [report.instance for report in reports]


def test_an_instance_lives_until_it_has_been_silent_for_too_long() -> None:
    fleet = Fleet()
    fleet.observe(worker("a"), 100.0)
    fleet.observe(worker("b"), 102.0)
    assert names(fleet.live(now=100.0 + STALE_SECONDS)) == ["a", "b"]
    assert names(fleet.live(now=100.1 + STALE_SECONDS)) == ["b"]
    assert names(fleet.live(now=102.1 + STALE_SECONDS)) == []


def test_a_report_of_the_forgotten_brings_them_back() -> None:
    fleet = Fleet(stale_seconds=1)
    fleet.observe(worker("a"), 100.0)
    assert not fleet.live(now=110.0)
    fleet.observe(worker("a"), 111.0)
    assert names(fleet.live(now=111.5)) == ["a"]


def test_the_last_report_counts() -> None:
    fleet = Fleet()
    fleet.observe(worker("a", 0), 100.0)
    fleet.observe(worker("a", 0, 1), 101.0)
    assert [report.shards for report in fleet.live(now=101.0)] == [(0, 1)]


def test_live_is_ordered_and_can_be_asked_for_one_service() -> None:
    fleet = Fleet()
    for service, instance in (("router", "r-2"), ("expert", "e-1"), ("router", "r-1"), ("gateway", "g-1")):
        fleet.observe(Status(service=service, instance=instance), 100.0)
    assert names(fleet.live(now=100.0)) == ["e-1", "g-1", "r-1", "r-2"]
    assert names(fleet.live("router", now=100.0)) == ["r-1", "r-2"]
    assert names(fleet.live("monitor", now=100.0)) == []


def test_two_services_may_have_instances_of_the_same_name() -> None:
    fleet = Fleet()
    fleet.observe(Status(service="router", instance="one"), 100.0)
    fleet.observe(Status(service="expert", instance="one"), 100.0)
    assert len(fleet.live(now=100.0)) == 2


def covered(*reports: Status) -> set[int]:
    fleet = Fleet(stale_seconds=float("inf"))
    for report in reports:
        fleet.observe(report, 0.0)
    return fleet.covered_shards(D)


def test_a_shard_is_covered_by_a_ready_worker_of_the_deployment() -> None:
    assert covered() == set()
    assert covered(worker("a", 0, 2), worker("b", 2, 3)) == {0, 2, 3}


def test_nobody_else_covers_a_shard() -> None:
    states: list[State] = ["starting", "loading", "draining"]
    assert covered(*(worker(state, 0, state=state) for state in states)) == set()
    assert covered(worker("a", 0, deployment="demo-00000000")) == set()
    assert covered(msgspec.structs.replace(worker("a"), wanted_shards=(0,))) == set()
    assert covered(Status(service="router", instance="r", deployment=D, state="ready", shards=(0,))) == set()


def said(subject: str, data: bytes) -> list[str]:
    """Who is known to live after one message."""
    fleet = Fleet()
    fleet.on_message(Msg(_client=Client(), subject=subject, data=data))
    return names(fleet.live())


def test_a_report_is_taken_from_the_bus() -> None:
    report = worker("a", 1)
    assert said(subjects.status("expert", "a"), wire.encode(report)) == ["a"]


def test_a_report_under_anothers_name_is_ignored() -> None:
    report = wire.encode(worker("a", 1))
    assert said(subjects.status("expert", "b"), report) == []
    assert said(subjects.status("router", "a"), report) == []
    assert said("moe.status.expert", report) == []
    assert said("moe.status.expert.a.b", report) == []


def test_bytes_that_are_no_report_are_ignored() -> None:
    for data in (b"", b"\xc1", b"{}", wire.encode(worker("a"))[:-1]):
        assert said(subjects.status("expert", "a"), data) == []
