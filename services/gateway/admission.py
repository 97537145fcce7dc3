"""Admission: so many generations in flight, so many in line, first come first served."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Self

from services.gateway.shedding import Shedding
from shared.errors import MoeError
from shared.instrumentation import ADMISSION_TIME


class Place:
    """A generation's place, or its turn in the line for one; enter it to wait, leave it to give it up."""

    def __init__(self, admission: Admission, joined: float) -> None:
        self.joined = joined
        self.taken: float | None = None
        self.turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._admission = admission
        self._left = False

    async def __aenter__(self) -> Self:
        """Wait for the place.

        Raises:
            MoeError: `queue_timeout`, after the service's timeout.

        """
        try:
            await self._admission.wait(self)
        except BaseException:
            self.leave()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.leave()

    def give(self, now: float) -> None:
        """Its turn has come."""
        self.taken = now
        self.turn.set_result(None)

    def leave(self) -> None:
        if not self._left:
            self._left = True
            self._admission.leave(self)


class Admission:
    """A fair limit on generations in flight, before it a line that is bounded in number and in time."""

    def __init__(
        self, limit: int, max_queued: int, timeout_seconds: float, max_queue_seconds: float = math.inf
    ) -> None:
        """Have no one inside yet.

        Args:
            limit: places.
            max_queued: of the line.
            timeout_seconds: the longest that anybody does wait; a line may take longer than expected.
            max_queue_seconds: the longest that anybody may have to expect to wait.

        """
        self._limit = limit
        self._max_queued = max_queued
        self._timeout_seconds = timeout_seconds
        self._line: deque[Place] = deque()
        self._shedding = Shedding(limit, max_queue_seconds)
        self.running = 0
        self.refused = 0
        """Requests refused at once, since the start."""

    @property
    def waiting(self) -> int:
        return len(self._line)

    def check(self, count: int) -> None:
        """Refuse a request for `count` generations at once if its turn would come too late or the line would overflow.

        Only its first generation's wait counts: its others wait for nobody but itself.

        Raises:
            MoeError: `overloaded`.

        """
        full = self.running + self.waiting + count > self._limit + self._max_queued
        if full or self._shedding.refuses(time.monotonic(), self.waiting):
            wait = self._shedding.expected_wait(time.monotonic(), self.waiting)
            message = f"{self.waiting} generations are waiting, for about {wait:.1f} s; try again later"
            self.refused += 1
            raise MoeError("overloaded", message, retry_after_seconds=wait)

    def join(self, count: int) -> list[Place]:
        """Places or turns in line for all `count` generations of a request; the caller must leave each.

        Raises:
            MoeError: `overloaded`, as `check`.

        """
        self.check(count)
        now = time.monotonic()
        places = [Place(self, now) for _ in range(count)]
        for place in places:
            if self.running < self._limit:
                self.running += 1
                self._shedding.took(now)
                place.give(now)
            else:
                self._line.append(place)
        return places

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Wait for one place.

        Raises:
            MoeError: `overloaded`, at once; `queue_timeout`, after the service's timeout.

        """
        async with self.join(1)[0]:
            yield

    async def wait(self, place: Place) -> None:
        """Wait until `place` has been given.

        Raises:
            MoeError: `queue_timeout`.

        """
        try:
            async with asyncio.timeout(place.joined + self._timeout_seconds - time.monotonic()):
                await place.turn
        except TimeoutError:
            wait = self._shedding.expected_wait(time.monotonic(), self.waiting)
            message = f"no place became free within {self._timeout_seconds:g} s; try again later"
            raise MoeError("queue_timeout", message, retry_after_seconds=wait) from None
        ADMISSION_TIME.observe(time.monotonic() - place.joined)

    def leave(self, place: Place) -> None:
        """Hand a given place to the first in line, or free it; take one that was not given out of the line."""
        now = time.monotonic()
        if place.taken is None:
            with contextlib.suppress(ValueError):  # passed over already: it ended in the very moment of its turn
                self._line.remove(place)
            return
        while self._line:
            following = self._line.popleft()
            if not following.turn.done():
                self._shedding.passed_on(now, place.taken)
                following.give(now)
                return
        self._shedding.freed(now, place.taken)
        self.running -= 1
