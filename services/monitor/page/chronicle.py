"""What was told on `moe.events.>`: alerts that fire, and decisions with their reasons. Pure and bounded."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace

from shared import subjects, wire
from shared.wire import Message

MAX_FAMILIES = 16
MAX_ENTRIES = 100
"""Of each family, so that many of one do not push out the few of another."""
MAX_ALERTS = 256
MAX_CHARACTERS = 1000
AUDIT = subjects.AUDIT.rsplit(".", maxsplit=1)[-1]
PRESENCE = ("service_appeared", "service_left", "service_down")


class Notice(Message, frozen=True, kw_only=True):
    """What an `Event` and an `AuditRecord` may have; docs/protocol.md has both."""

    id: str = ""
    kind: str = ""
    action: str = ""
    subject: str = ""
    text: str = ""
    time: float = 0.0
    actor: str = ""
    state: str = ""
    severity: str = ""
    fingerprint: str = ""
    outcome: str = ""
    """What became of a decision."""


@dataclass(frozen=True)
class Entry:
    """One thing that was told."""

    time: float
    """Unix seconds."""
    family: str
    """The last part of its subject: alert, scaling, takeover, audit …"""
    kind: str
    """What happened, or an alert's rule."""
    subject: str
    text: str
    by: str
    state: str = ""
    """Of an alert: firing or resolved; empty where that was not said."""
    severity: str = ""
    action: str = ""
    """What an alert calls for."""
    key: str = ""
    """The same in all that is told of one alert; of a record, its id, by which a repetition is known."""


class Chronicle:
    """The newest entries of each family, and which alerts fire."""

    def __init__(self) -> None:
        self._entries: dict[str, deque[Entry]] = {}
        self._alerts: dict[str, Entry] = {}

    def note(self, subject: str, data: bytes, now: float) -> None:
        """Take what came on `subject` at the Unix time `now`; the same twice counts once.

        Raises:
            BadMessageError: it is no event.

        """
        family = subject.rsplit(".", maxsplit=1)[-1]
        notice = wire.decode(Notice, data)
        at = notice.time if math.isfinite(notice.time) and 0 < notice.time <= now + 60 else now
        told = f"{notice.text}; {notice.outcome}" if notice.outcome else notice.text
        kind, subject_, text = (_short(t) for t in (notice.kind or notice.action, notice.subject, told))
        alert = family == "alert"
        about = _short(notice.fingerprint) or f"{kind} {subject_}"
        entry = Entry(
            time=at,
            family=family,
            kind=kind,
            subject=subject_,
            text=text,
            by=_short(notice.actor),
            state=_short(notice.state),
            severity=_short(notice.severity),
            action=_short(notice.action) if notice.kind else "",
            key=about if alert else _short(notice.id),
        )
        if family not in self._entries and len(self._entries) >= MAX_FAMILIES:
            return
        entries = self._entries.setdefault(family, deque(maxlen=MAX_ENTRIES))
        if entry in entries or (not alert and entry.key and any(e.key == entry.key for e in entries)):
            return
        entries.append(entry)
        if alert:
            self._note_alert(entry)

    def _note_alert(self, entry: Entry) -> None:
        known = self._alerts.get(entry.key)
        if known is None or known.time <= entry.time:
            self._alerts.pop(entry.key, None)
            self._alerts[entry.key] = entry
        while len(self._alerts) > MAX_ALERTS:
            resolved = (key for key, e in self._alerts.items() if e.state != "firing")
            del self._alerts[next(resolved, next(iter(self._alerts)))]

    def firing(self) -> list[Entry]:
        """Alerts whose last word was that they fire, the oldest first."""
        return sorted((e for e in self._alerts.values() if e.state == "firing"), key=lambda e: e.time)

    def alerts(self, count: int) -> list[Entry]:
        """What was last told of alerts, the newest first."""
        return sorted(self._entries.get("alert", ()), key=lambda e: -e.time)[:count]

    def decisions(self, count: int) -> list[Entry]:
        """What was decided or done, the newest first; without alerts and who came or went, which show elsewhere."""
        found = [
            e
            for family, entries in self._entries.items()
            for e in entries
            if family != "alert" and not e.kind.startswith("alert_") and e.kind not in PRESENCE
        ]
        kept: dict[tuple[float, str], list[Entry]] = {}
        for e in sorted(found, key=lambda e: (-e.time, -len(e.text), not e.by, e.family)):
            same = kept.setdefault((e.time, e.subject), [])
            for n, other in enumerate(same):  # an event and the record of it: once, by the event's name
                if other.family != e.family and other.text.startswith(e.text):
                    same[n] = replace(other, kind=e.kind) if other.family == AUDIT else other
                    break
            else:
                same.append(e)
        return [e for same in kept.values() for e in same][:count]

    def presence(self, count: int) -> list[Entry]:
        """Who came and went, the newest first."""
        kept = self._entries.get(AUDIT, ())
        return sorted((e for e in kept if e.kind in PRESENCE), key=lambda e: -e.time)[:count]


def _short(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"
