"""What was told, kept in order and in bounds."""

from __future__ import annotations

import pytest

from services.monitor.messages import AuditRecord, Event
from services.monitor.page.chronicle import (
    MAX_ALERTS,
    MAX_CHARACTERS,
    MAX_ENTRIES,
    MAX_FAMILIES,
    Chronicle,
    Notice,
)
from shared import subjects, wire
from shared.errors import BadMessageError

NOW = 1_767_225_600.0


def alert(state: str, at: float, *, subject: str = "demo/1", rule: str = "shard_without_replica") -> bytes:
    return wire.encode(Notice(kind=rule, subject=subject, text="no worker", time=at, state=state, severity="critical"))


def event(text: str = "", at: float = NOW, *, kind: str = "scale_up") -> bytes:
    return wire.encode(Event(kind=kind, subject="expert", text=text, time=at))


def record(action: str, at: float = NOW, *, record_id: str = "1") -> bytes:
    text = "expert-1 has come"
    return wire.encode(
        AuditRecord(id=record_id, time=at, actor="monitor-1", action=action, subject="expert-1", text=text)
    )


def test_an_alert_fires_until_it_is_resolved() -> None:
    told = Chronicle()
    told.note("moe.events.alert", alert("firing", NOW), NOW)
    told.note("moe.events.alert", alert("firing", NOW, subject="demo/2"), NOW)
    told.note("moe.events.alert", alert("resolved", NOW + 5), NOW + 5)
    assert [e.subject for e in told.firing()] == ["demo/2"]
    assert [e.state for e in told.alerts(10)] == ["resolved", "firing", "firing"]


def test_what_is_read_late_does_not_undo_what_was_told_since() -> None:
    told = Chronicle()
    told.note("moe.events.alert", alert("resolved", NOW + 5), NOW + 6)
    told.note("moe.events.alert", alert("firing", NOW), NOW + 6)
    assert told.firing() == []


def test_an_event_without_a_state_is_told_and_does_not_fire_for_ever() -> None:
    told = Chronicle()
    told.note("moe.events.alert", event(kind="service_down"), NOW)
    assert told.firing() == []
    assert [e.kind for e in told.alerts(10)] == ["service_down"]


def test_the_same_heard_and_read_counts_once() -> None:
    told = Chronicle()
    for _ in range(2):
        told.note("moe.events.scaling", event("2 -> 3"), NOW)
        told.note("moe.events.alert", alert("firing", NOW), NOW)
        told.note(subjects.AUDIT, record("placement_changed"), NOW)
    assert len(told.alerts(10)) == 1
    assert sorted(e.kind for e in told.decisions(10)) == ["placement_changed", "scale_up"]


def test_decisions_are_the_newest_first_and_without_who_came_and_went() -> None:
    told = Chronicle()
    told.note("moe.events.scaling", event("older", NOW - 60), NOW)
    told.note("moe.events.takeover", event("newer", NOW - 1, kind="takeover"), NOW)
    told.note(subjects.AUDIT, record("service_appeared"), NOW)
    told.note(subjects.AUDIT, record("alert_opened", record_id="2"), NOW)
    assert [e.text for e in told.decisions(10)] == ["newer", "older"]
    assert [e.text for e in told.decisions(1)] == ["newer"]
    assert [(e.kind, e.by) for e in told.presence(10)] == [("service_appeared", "monitor-1")]


def test_a_decision_and_the_record_of_it_show_once_with_what_became_of_it() -> None:
    scaled = Notice(
        kind="scale_up", subject="expert", text="2 -> 3", outcome="one started", time=NOW, actor="monitor-1"
    )
    kept = AuditRecord(
        id="7", time=NOW, actor="monitor-1", action="scaled", subject="expert", text="2 -> 3; one started"
    )
    for order in (1, -1):
        told = Chronicle()
        for subject, message in [("moe.events.scaling", scaled), (subjects.AUDIT, kept)][::order]:
            told.note(subject, wire.encode(message), NOW)
        told.note("moe.events.scaling", event("another thing", NOW), NOW)
        found = {(e.kind, e.text, e.by) for e in told.decisions(10)}
        assert found == {("scale_up", "2 -> 3; one started", "monitor-1"), ("scale_up", "another thing", "")}


@pytest.mark.parametrize("at", [float("nan"), float("inf"), -1.0, 0.0, 1e300, NOW + 3600])
def test_a_time_that_cannot_be_is_the_time_of_arrival(at: float) -> None:
    told = Chronicle()
    told.note("moe.events.scaling", event(at=at), NOW)
    assert [e.time for e in told.decisions(1)] == [NOW]


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x80" * 3, b"\x81\xa4kind\x01", b"\xff" * 100])
def test_what_is_no_event_is_refused(data: bytes) -> None:
    with pytest.raises(BadMessageError):
        Chronicle().note("moe.events.alert", data, NOW)


def test_many_of_one_family_do_not_push_out_the_few_of_another() -> None:
    told = Chronicle()
    told.note("moe.events.takeover", event(kind="takeover"), NOW)
    for n in range(5 * MAX_ENTRIES):
        told.note("moe.events.scaling", event(str(n), NOW + n), NOW + n)
    kinds = [e.kind for e in told.decisions(10 * MAX_ENTRIES)]
    assert kinds.count("scale_up") == MAX_ENTRIES
    assert kinds.count("takeover") == 1


def test_nothing_grows_without_a_bound() -> None:
    told = Chronicle()
    for n in range(3 * MAX_ALERTS):
        told.note("moe.events.alert", alert("firing" if n % 2 else "resolved", NOW + n, subject=str(n)), NOW + n)
    for n in range(3 * MAX_FAMILIES):
        told.note(f"moe.events.kind-{n}", event("x" * 10 * MAX_CHARACTERS), NOW)
    assert len(told._alerts) == MAX_ALERTS
    assert len(told.firing()) == MAX_ALERTS  # the resolved go first
    assert len(told._entries) == MAX_FAMILIES
    assert max(len(e.text) for e in told.decisions(10 * MAX_ENTRIES)) == MAX_CHARACTERS
