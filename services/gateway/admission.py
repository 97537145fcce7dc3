"""Admission: so many generations in flight, so many in line, first come first served."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

from shared.errors import MoeError


class Admission:
    """A fair limit on generations in flight, with a bounded line before it."""

    def __init__(self, limit: int, max_queued: int, timeout_seconds: float) -> None:
        self._limit = limit
        self._max_queued = max_queued
        self._timeout_seconds = timeout_seconds
        self._line: deque[asyncio.Future[None]] = deque()
        self.running = 0

    @property
    def waiting(self) -> int:
        return len(self._line)

    def check(self, count: int) -> None:
        """Refuse `count` generations at once if the line would overflow, before anything is made of them.

        Raises:
            MoeError: `overloaded`.

        """
        if self.running + self.waiting + count > self._limit + self._max_queued:
            raise self._overloaded()

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Wait for a place.

        Raises:
            MoeError: `overloaded`, if the line is full; `queue_timeout`, after the service's timeout.

        """
        await self._enter()
        try:
            yield
        finally:
            self._leave()

    async def _enter(self) -> None:
        if self.running < self._limit:
            self.running += 1
            return
        if len(self._line) >= self._max_queued:
            raise self._overloaded()
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.append(turn)
        try:
            async with asyncio.timeout(self._timeout_seconds):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self._leave()  # the place was given at the very moment that the wait ended
            elif turn in self._line:
                self._line.remove(turn)
            if isinstance(error, TimeoutError):
                message = f"no place became free within {self._timeout_seconds:g} s; try again in a moment"
                raise MoeError("queue_timeout", message) from None
            raise

    def _leave(self) -> None:
        """Hand the place to the first in line, or free it."""
        while self._line:
            turn = self._line.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.running -= 1

    def _overloaded(self) -> MoeError:
        return MoeError("overloaded", f"{self.waiting} generations are waiting; try again in a moment")
