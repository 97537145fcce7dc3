"""Who is refused rather than kept waiting in line. A pure core: no I/O, and the clock is passed in.

The wait is estimated from how fast places became free while all of them were taken: that is what the service can do
(at other times it is only what was asked of it). By Little's law (Operations Research 9(3), 1961) whoever stands behind
`ahead` others waits for `ahead` + 1 places.

A burst may fill the line up to the longest wait. Once hardly a place was free for so long, it is no burst but
overload, in which a long line only makes everybody late; it is then kept at a tenth. This is the idea of CoDel
(RFC 8289), which "Fail at Scale" (ACM Queue 13(8), 2015) brought to requests; as in CoDel, one may always wait.
"""

from __future__ import annotations

import math

WINDOW_SECONDS = 10.0
"""Time constant of the memory, counted while all places are taken: it keeps what was learnt through quiet hours."""
GUESS_WEIGHT = 4.0
"""Until about so many places have become free, the ages of those inside say more."""
LASTING_SHARE = 0.1
"""Of the longest wait: what the line may take in lasting overload. RFC 8289 advises 5 to 10 % of its interval."""
FULL_SHARE = 0.9
"""Of the last while: when all places were taken for so much of it, overload lasts. A moment's pause does not end it."""


class Shedding:
    """Estimates the wait in line for `places` places, and decides who joins it. Times are of one monotonic clock."""

    def __init__(self, places: int, max_wait_seconds: float) -> None:
        self._places = places
        self._max_wait = max_wait_seconds
        self._taken = 0
        self._full = False
        self._starts = 0.0
        """Sum of the times at which those inside came in."""
        self._freed = 0.0
        """Places that became free while all were taken; older ones count less."""
        self._full_seconds = 0.0
        """How long all were taken; older times count less."""
        self._full_share = 0.0
        """Of the time up to `_looked`, how much all places were taken; older times count less."""
        self._looked = 0.0
        self._memory = max_wait_seconds / -math.log(1 - FULL_SHARE)  # so that it takes `max_wait_seconds` from 0 on

    def took(self, now: float) -> None:
        """A free place was taken."""
        self._look(now)
        self._taken += 1
        self._starts += now
        if self._taken == self._places:
            self._full = True

    def passed_on(self, now: float, took_at: float) -> None:
        """The place that was taken at `took_at` was given to the first in line."""
        self._look(now)
        self._freed += 1
        self._starts += now - took_at

    def freed(self, now: float, took_at: float) -> None:
        """The place that was taken at `took_at` is free."""
        self._look(now)
        if self._full:
            self._freed += 1
            self._full = False
        self._taken -= 1
        self._starts = self._starts - took_at if self._taken else 0.0

    def expected_wait(self, now: float, ahead: int) -> float:
        """Seconds until whoever stands behind `ahead` others gets a place; 0 while one is free."""
        self._look(now)
        if not self._full:
            return 0.0
        # Before anything is known: whoever is inside has as long to go as it has been there. In a steady state that is
        # never too fast (the inspection paradox: the mean age is at least half of the mean stay).
        guess = 2 * max(0.0, now - self._starts / self._taken) / self._places
        seconds_per_place = (self._full_seconds + GUESS_WEIGHT * guess) / (self._freed + GUESS_WEIGHT)
        return (ahead + 1) * seconds_per_place

    def refuses(self, now: float, ahead: int) -> bool:
        """Whether whoever would stand behind `ahead` others is sent away."""
        wait = self.expected_wait(now, ahead)
        lasting = self._full_share >= FULL_SHARE
        return wait > self._max_wait or (lasting and ahead > 0 and wait > LASTING_SHARE * self._max_wait)

    def _look(self, now: float) -> None:
        """Count the time up to `now`."""
        kept = math.exp(min(0.0, self._looked - now) / self._memory)
        self._full_share = self._full_share * kept + (1 - kept) * self._full
        if self._full:
            kept = math.exp(min(0.0, self._looked - now) / WINDOW_SECONDS)
            self._freed *= kept
            self._full_seconds = self._full_seconds * kept + WINDOW_SECONDS * (1 - kept)
        self._looked = now
