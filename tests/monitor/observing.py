"""Observations made by hand."""

from __future__ import annotations

from typing import Any

from services.monitor.observations import Measured, Observation
from shared.histogram import Histogram
from shared.settings import MonitorSettings
from shared.status import Status

NOW = 1_767_225_600.0
WINDOW = 60.0
DEPLOYMENT = "demo-3f2a91bc"
STATUS_FIELDS = {f for f in Status.__struct_fields__ if f not in ("service", "instance")}


def instance(name: str, *, age: float = 0.5, seconds: float = WINDOW, **more: Any) -> Measured:
    """One instance of the service that its name begins with; `more` are fields of its status or of what it did."""
    service = name.split("-", maxsplit=1)[0]
    did = {key: more.pop(key) for key in ("latencies", "cache_lookups", "cache_hits", "expert_tokens") if key in more}
    status = {key: more.pop(key) for key in tuple(more) if key in STATUS_FIELDS}
    facts = {"deployment": DEPLOYMENT, "state": "ready", "started": NOW - 1000, **status}
    if "cache_lookups" in did:
        facts["cache_lookups"] = did["cache_lookups"]
    return Measured(Status(service=service, instance=name, **facts), age, seconds, **did, **more)


def seen(*instances: Measured, now: float = NOW) -> Observation:
    ordered = sorted(instances, key=lambda m: (m.service, m.instance))
    return Observation(now, WINDOW, tuple(ordered))


def settings(**changed: Any) -> MonitorSettings:
    """The defaults but for `changed`."""
    return MonitorSettings(**{"monitor_port": 0, **changed})


def counts(*milliseconds: float) -> tuple[int, ...]:
    histogram = Histogram()
    for each in milliseconds:
        histogram.observe(each / 1000)
    return histogram.counts()
