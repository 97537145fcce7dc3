"""What one monitor sees, and whether it is the one that acts."""

from __future__ import annotations

import time
from collections.abc import Iterable

from services.monitor.observations import History, Observation
from shared.bus import Bus
from shared.status import Status

HISTORY_SECONDS = 600.0
SPACING_SECONDS = 10.0
"""Of what is older than RECENT_SECONDS: a large model's report has as many counters as layers times experts."""
RECENT_SECONDS = 70.0


class Sight:
    """The fleet's reports, as this monitor hears them."""

    def __init__(self, instance: str, *, seconds: float = HISTORY_SECONDS) -> None:
        self.instance = instance
        self._recent = History(min(seconds, RECENT_SECONDS))
        self._history = History(seconds, spacing=SPACING_SECONDS)

    def tell(self, status: Status, now: float) -> None:
        """Take note of a report that came at `now`, on the monotonic clock."""
        self._recent.observe(status, now)
        self._history.observe(status, now)

    def look(self, bus: Bus, window: float) -> Observation:
        """The last `window` seconds."""
        history = self._recent if window <= RECENT_SECONDS else self._history
        return history.observation(time.monotonic(), time.time(), window=window, connected=bus.connected)


def leader(observation: Observation) -> str | None:
    """The one monitor that acts: of those that are ready, the one that started first; None if none is heard of.

    Each of several monitors comes to the same, from the same reports, without talking. For a moment after a change two
    may act, or none, so whatever they do must bear being done twice.
    """
    return acting(m.status for m in observation.ready("monitor"))


def acting(monitors: Iterable[Status]) -> str | None:
    """`leader` of the monitors' reports themselves, for those who only hear them."""
    ready = [(s.started, s.instance) for s in monitors if s.service == "monitor" and s.state == "ready"]
    return min(ready)[1] if ready else None
