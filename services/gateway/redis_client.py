"""Redis as the gateway treats it: never needed. A call waits a moment at most, and a failure is followed by a pause."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog
from redis.asyncio import BlockingConnectionPool, Redis
from redis.exceptions import RedisError

log = structlog.get_logger()
T = TypeVar("T")

REDIS_SECONDS = 0.25
"""Longest wait for Redis; a router's answer takes about as long."""
PAUSE_SECONDS = 1.0
"""After a failure Redis is left alone for so long: a request should not wait for it again and again."""
MAX_CONNECTIONS = 64


class RedisUnavailableError(Exception):
    """Redis does not answer, or did not a moment ago."""


class RedisClient:
    """One Redis, which may come and go."""

    def __init__(self, url: str, name: str) -> None:
        """Use the Redis at `url`; nothing is sent yet. `name` begins the events that the log has of it."""
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            timeout=REDIS_SECONDS,
            socket_timeout=REDIS_SECONDS,
            socket_connect_timeout=REDIS_SECONDS,
            retry=None,
        )
        self._redis = Redis.from_pool(pool)
        self._events = f"{name}.available", f"{name}.unavailable"
        self._paused_until = 0.0
        self.available = True
        """Whether Redis answered when it was last asked."""

    async def call(self, command: Callable[[Redis], Awaitable[T]]) -> T:
        """What `command` gets from Redis.

        Raises:
            RedisUnavailableError: after REDIS_SECONDS, or at once in the pause after a failure.

        """
        if time.monotonic() < self._paused_until:
            raise RedisUnavailableError
        try:
            async with asyncio.timeout(REDIS_SECONDS):
                result = await command(self._redis)
        except (RedisError, OSError) as error:  # TimeoutError is an OSError
            self._failed(error)
            raise RedisUnavailableError from None
        if not self.available:
            self.available = True
            log.info(self._events[0])
        return result

    async def close(self) -> None:
        await self._redis.aclose()

    def _failed(self, error: Exception) -> None:
        self._paused_until = time.monotonic() + PAUSE_SECONDS
        if self.available:
            self.available = False
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            log.warning(self._events[1], reason=reason)
