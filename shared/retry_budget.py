"""How many calls may be sent once more: a share of all calls, so that an outage is not made worse by its own retries.

The token bucket of Finagle's RetryBudget (https://twitter.github.io/finagle/guide/Clients.html#retries): each call pays
in a share of a token, each further try takes one out. A pure core: the clock is passed in.
"""

from __future__ import annotations


class RetryBudget:
    """A bucket of tries."""

    def __init__(
        self, share: float, *, saved: float = 0.0, reserve_per_second: float = 0.0, most: float = 100.0
    ) -> None:
        """Begin with `saved` tries.

        Args:
            share: further tries per call, in the long run.
            saved: tries to begin with.
            reserve_per_second: tries that come by themselves, for those who call seldom.
            most: tries that can be saved up.

        """
        self._share = share
        self._reserve_per_second = reserve_per_second
        self._most = most
        self._balance = min(saved, most)
        self._filled: float | None = None
        self.calls = 0
        self.taken = 0
        self.refused = 0

    def called(self, count: int = 1) -> None:
        """`count` calls were sent for the first time."""
        self.calls += count
        self._balance = min(self._most, self._balance + self._share * count)

    def take(self, now: float) -> bool:
        """Whether one may be sent once more; if so, it is counted."""
        if self._filled is not None:
            earned = self._reserve_per_second * max(0.0, now - self._filled)
            self._balance = min(self._most, self._balance + earned)
        self._filled = now
        if self._balance < 1.0:
            self.refused += 1
            return False
        self._balance -= 1.0
        self.taken += 1
        return True
