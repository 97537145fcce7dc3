"""Which small requests travel as one message: a pure core without clock, loop or bus."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

QUIET_SECONDS = 0.002
"""So long without an arrival, and those who were just answered are taken not to come back at once."""


@dataclass(eq=False, frozen=True)
class Member(Generic[T]):
    """One request of some rows."""

    rows: int
    since: float
    """When it came, in seconds on the caller's clock."""
    payload: T


@dataclass
class Gathering(Generic[T]):
    """The line of one layer's requests: who of them leaves when.

    Nagle's rule (RFC 896), with batches for segments: a full batch leaves at once, and so does anything while nothing
    is under way; otherwise requests gather until what is under way has come back. The ones that are then answered often
    come again at once, so the next batch waits for as many rows as there were before, as long as requests keep coming.
    Nothing waits longer than `wait_seconds`.
    """

    max_rows: int
    """Of one batch."""
    wait_seconds: float
    waiting: deque[Member[T]] = field(default_factory=deque)
    rows: int = 0
    """Of all that wait."""
    under_way: int = 0
    """Batches that have left and not come back."""
    wanted_rows: int = 0
    """While those who were answered may come back: so many rows are waited for; else 0."""
    _arrivals: int = 0
    _looked: float = 0.0

    def join(self, member: Member[T]) -> None:
        self.waiting.append(member)
        self.rows += member.rows
        self._arrivals += 1

    def leave(self, member: Member[T]) -> None:
        """Forget `member`, if it still waits."""
        if member in self.waiting:
            self.waiting.remove(member)
            self.rows -= member.rows

    def take(self, now: float) -> list[Member[T]]:
        """The batch that leaves now, in order of arrival; empty if none does."""
        if not self.waiting or not self._leaves(now):
            return []
        batch = [self.waiting.popleft()]
        rows = batch[0].rows
        while self.waiting and rows + self.waiting[0].rows <= self.max_rows:
            batch.append(self.waiting.popleft())
            rows += batch[-1].rows
        self.rows -= rows
        self.under_way += 1
        self.wanted_rows = 0
        return batch

    def _leaves(self, now: float) -> bool:
        if self.rows >= self.max_rows or now - self.waiting[0].since >= self.wait_seconds:
            return True
        return not self.under_way and self.rows >= self.wanted_rows

    def came_back(self, batch: list[Member[T]], now: float) -> None:
        """Take note that `batch` is answered."""
        self.under_way -= 1
        self.wanted_rows = min(self.max_rows, self.rows + sum(member.rows for member in batch))
        self._arrivals, self._looked = 0, now

    def look(self, now: float) -> float | None:
        """Take note of the time; when to do so again, None if only an arrival or a return changes anything.

        A look that comes late counts for nothing: the caller was busy, and arrivals may lie unread.
        """
        if self.wanted_rows:
            late = now - self._looked > 2 * QUIET_SECONDS
            if now - self._looked >= QUIET_SECONDS:
                if not self._arrivals and not late:
                    self.wanted_rows = 0
                self._arrivals, self._looked = 0, now
        if self.wanted_rows:
            return self._looked + QUIET_SECONDS
        return self.waiting[0].since + self.wait_seconds if self.waiting else None
