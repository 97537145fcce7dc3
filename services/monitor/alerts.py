"""When an alert fires, when it is over, and who is told: pure, exact, and the same for every monitor.

    nothing --bad--> pending --bad for the pending time--> firing --good--> over
                     pending --good, between, or no reading--> nothing

`between` the two thresholds, and while nobody can tell, a firing alert stays. What nobody can tell of does not count
towards the pending time either. (States and groups are Prometheus' and Alertmanager's:
https://prometheus.io/docs/alerting/latest/alertmanager/.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import msgspec

from services.monitor.messages import Event, OpenAlert
from services.monitor.rules import RULES, Key, Reading
from shared.settings import MonitorSettings

MOST = 500
"""Alerts at once: nobody reads more, and all must fit into one message."""

Group = tuple[str, str, str]
"""(rule, deployment, service): who is told of several alerts is told once."""


@dataclass(frozen=True)
class Alert:
    """A rule that one subject breaks."""

    reading: Reading
    """The last one that was known."""
    firing: bool
    since: float
    """Unix seconds: when it fired; of a pending one, since when it is bad, later by all that is unknown."""
    looked: float
    """Unix seconds of the last reading, known or not."""


State = Mapping[Key, Alert]
Closed = Mapping[Key, str]
"""Alerts that are over, each with the sentence that says why."""


def step(before: State, readings: Iterable[Reading], now: float, settings: MonitorSettings) -> tuple[State, Closed]:
    """The alerts after a look.

    Args:
        before: those after the look before.
        readings: of this look; the last one counts where a rule and subject have several.
        now: Unix seconds of the look.
        settings: the pending times, and after how long what has no reading at all is over.

    """
    found = {reading.key: reading for reading in readings}
    after: dict[Key, Alert] = {}
    closed: dict[Key, str] = {}
    for key in {**before, **found}:
        alert, reading = before.get(key), found.get(key)
        if alert is None:
            begins = reading is not None and reading.verdict == "bad" and len(after) < MOST
            alert = _begun(reading, now, settings) if reading and begins else None
        elif reading is None:
            if alert.firing and now - alert.looked > settings.alert_forget_seconds:
                closed[key] = f"nothing was heard of it for {now - alert.looked:.0f} s: {alert.reading.text}"
                alert = None
            elif not alert.firing:
                alert = None
        elif reading.verdict == "unknown":
            since = alert.since if alert.firing else alert.since + now - alert.looked
            alert = replace(alert, since=since, looked=now)
        elif reading.verdict == "bad" and not alert.firing:
            since = min(alert.since, now)  # a clock that is set back must not keep it from firing
            fires = now - since >= pending_seconds(reading, settings)
            alert = Alert(reading, fires, now if fires else since, now)
        elif alert.firing and reading.verdict == "good":
            closed[key] = reading.text
            alert = None
        elif alert.firing:
            alert = replace(alert, reading=reading, looked=now)
        else:
            alert = None
        if alert is not None:
            after[key] = alert
    return after, closed


def _begun(reading: Reading, now: float, settings: MonitorSettings) -> Alert:
    return Alert(reading, pending_seconds(reading, settings) <= 0, now, now)


def pending_seconds(reading: Reading, settings: MonitorSettings) -> float:
    urgent = RULES[reading.rule].urgent
    return settings.alert_urgent_pending_seconds if urgent else settings.alert_pending_seconds


def adopted(state: State, told: Iterable[OpenAlert], now: float) -> State:
    """`state`, and what everybody was told of before: it fires until a look says otherwise."""
    after = dict(state)
    for each in told:
        if each.kind not in RULES:  # a later release's
            continue
        reading = Reading(
            rule=each.kind,
            subject=each.subject,
            verdict="bad",
            text=each.text,
            value=each.value,
            threshold=each.threshold,
            deployment=each.deployment,
            service=each.service,
            instance=each.instance,
        )
        mine = after.get(reading.key)
        after[reading.key] = Alert(mine.reading if mine else reading, firing=True, since=each.started, looked=now)
    return after


# -- who is told -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Notification:
    """One message about one group: all of it that fires, and what is over since the last one."""

    group: Group
    firing: tuple[OpenAlert, ...]
    resolved: tuple[OpenAlert, ...]
    """Each with the sentence that says why it is over."""
    time: float
    """Unix seconds."""


@dataclass(frozen=True)
class Telling:
    """What is to be said now, and what has been told once it is."""

    told: tuple[OpenAlert, ...]
    events: tuple[Event, ...]
    """One for each alert that fires or is over."""
    notifications: tuple[Notification, ...]
    """One for each group in which something changed, or that was not told of for the repeat interval."""


def telling(told: Sequence[OpenAlert], state: State, closed: Closed, now: float, repeat_seconds: float) -> Telling:
    """What has to be said, so that everybody knows of `state` who knows of `told`."""
    known = {key_of(each): each for each in told}
    firing = {key: alert for key, alert in state.items() if alert.firing}
    begun = {key: open_alert(alert) for key, alert in firing.items() if key not in known}
    over = {
        key: msgspec.structs.replace(each, text=closed.get(key, f"no more: {each.text}"))
        for key, each in known.items()
        if key not in firing
    }
    current = {**{key: each for key, each in known.items() if key not in over}, **begun}
    events = [event(each, "firing", now) for each in begun.values()]
    events += [event(each, "resolved", now) for each in over.values()]
    changed = {group_of(each) for each in (*begun.values(), *over.values())}
    changed |= {group_of(each) for each in current.values() if now - each.notified >= repeat_seconds}
    current = {
        key: msgspec.structs.replace(each, notified=now) if group_of(each) in changed else each
        for key, each in current.items()
    }
    notifications = [
        Notification(
            group,
            tuple(each for each in current.values() if group_of(each) == group),
            tuple(each for each in over.values() if group_of(each) == group),
            now,
        )
        for group in sorted(changed)
    ]
    return Telling(tuple(current.values()), tuple(events), tuple(notifications))


def key_of(each: OpenAlert) -> Key:
    return each.kind, each.service, each.subject


def group_of(each: OpenAlert) -> Group:
    return each.kind, each.deployment, each.service


def fingerprint(each: OpenAlert) -> str:
    """16 hex digits that name the alert, whenever it fires."""
    return hashlib.sha256("\n".join(key_of(each)).encode()).hexdigest()[:16]


def open_alert(alert: Alert) -> OpenAlert:
    reading, rule = alert.reading, RULES[alert.reading.rule]
    return OpenAlert(
        kind=reading.rule,
        subject=reading.subject,
        text=reading.text,
        service=reading.service,
        deployment=reading.deployment,
        instance=reading.instance,
        severity=rule.severity,
        action=reading.action or rule.action,
        advice=reading.advice or rule.advice,
        value=reading.value,
        threshold=reading.threshold,
        started=alert.since,
    )


def event(each: OpenAlert, state: Literal["firing", "resolved"], now: float) -> Event:
    return Event(
        kind=each.kind,
        subject=each.subject,
        text=each.text,
        time=now,
        state=state,
        severity=each.severity,
        action=each.action,
        value=each.value,
        threshold=each.threshold,
        started=each.started,
        fingerprint=fingerprint(each),
    )
