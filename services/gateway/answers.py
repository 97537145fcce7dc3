"""Answers that are known already: what a repeated greedy request gets from Redis instead of a router.

At temperature 0 a generation is a function of its request (docs/decisions/0005-numerics.md), so its chunks may be kept
and given again, to the token. Redis is never needed: while it does not answer, requests go to the routers.
"""

from __future__ import annotations

import hashlib
import time

import msgspec
import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.router.messages import GenerateChunk, GenerateRequest
from shared import wire
from shared.errors import BadMessageError
from shared.instrumentation import CACHE_LOOKUPS
from shared.settings import GatewaySettings

log = structlog.get_logger()

REDIS_SECONDS = 0.25
"""Longest wait for Redis; a router's answer takes about as long."""
PAUSE_SECONDS = 1.0
"""After a failure Redis is left alone for so long: a request should not wait for it again and again."""
MAX_ANSWER_BYTES = 1024 * 1024


class Answer(wire.Message, frozen=True, kw_only=True):
    """The value of one key: all chunks of one finished generation."""

    chunks: list[GenerateChunk]


def key_of(deployment: str, request: GenerateRequest) -> str | None:
    """The key of the request's answer; None if it has none, as its tokens are drawn anew each time.

    Everything that shapes the chunks is in the key. The deployment's name carries the checkpoint's fingerprint, so
    another model's answer is never found.
    """
    if request.sampling.temperature > 0:
        return None
    if request.return_logits or request.return_prompt_logits:
        return None
    # The seed is drawn anew for each request, and unused at temperature 0.
    sampling = msgspec.structs.replace(request.sampling, seed=0)
    nameless = msgspec.structs.replace(request, id="", client="", sampling=sampling)
    return f"moe:{deployment}:answer:{hashlib.sha256(wire.encode(nameless)).hexdigest()}"


class Answers:
    """The answers in Redis, or none if there is no Redis."""

    def __init__(self, redis: Redis | None, deployment: str, ttl_seconds: int) -> None:
        self._redis = redis
        self._deployment = deployment
        self._ttl_seconds = ttl_seconds
        self._paused_until = 0.0
        self._hit, self._miss, self._skipped = (CACHE_LOOKUPS.labels(r) for r in ("hit", "miss", "unavailable"))
        self.available = redis is not None
        """Whether Redis answered when it was last asked."""
        self.hits = 0
        self.lookups = 0

    @classmethod
    def open(cls, settings: GatewaySettings, deployment: str) -> Answers:
        """Use the Redis of REDIS_URL, which may come and go; nothing is sent yet."""
        redis = None
        if settings.redis_url and settings.enable_caching:
            redis = Redis.from_url(
                settings.redis_url,
                socket_timeout=REDIS_SECONDS,
                socket_connect_timeout=REDIS_SECONDS,
                retry=None,
                max_connections=64,
            )
        return cls(redis, deployment, settings.cache_ttl_seconds)

    @property
    def enabled(self) -> bool:
        return self._redis is not None

    def key(self, request: GenerateRequest) -> str | None:
        """The key to look up and to keep the answer by; None if this request has no repeatable answer."""
        return key_of(self._deployment, request) if self._redis is not None else None

    async def find(self, key: str) -> list[GenerateChunk] | None:
        """The chunks of a finished generation, or None: not there, damaged, or Redis does not answer."""
        self.lookups += 1
        if self._redis is None or time.monotonic() < self._paused_until:
            self._skipped.inc()
            return None
        try:
            data = await self._redis.get(key)
        except (RedisError, OSError) as error:
            self._failed(error)
            self._skipped.inc()
            return None
        self._answered()
        chunks = self._decode(key, data) if isinstance(data, bytes) and data else None
        if chunks is None:
            self._miss.inc()
            return None
        self._hit.inc()
        self.hits += 1
        return chunks

    async def keep(self, key: str, chunks: list[GenerateChunk]) -> None:
        """Keep a finished generation for CACHE_TTL_SECONDS; a failure costs the next request the same work, no more."""
        if self._redis is None or time.monotonic() < self._paused_until:
            return
        data = wire.encode(Answer(chunks=chunks))
        if len(data) > MAX_ANSWER_BYTES:
            return
        try:
            await self._redis.set(key, data, ex=self._ttl_seconds)
        except (RedisError, OSError) as error:
            self._failed(error)
        else:
            self._answered()

    async def close(self) -> None:
        if self._redis is not None:
            await self._redis.aclose()

    def _decode(self, key: str, data: bytes) -> list[GenerateChunk] | None:
        try:
            chunks = wire.decode(Answer, data).chunks
        except BadMessageError as error:
            log.warning("cache.damaged", key=key, reason=error.message)
            return None
        return chunks if chunks and chunks[-1].finish_reason is not None else None

    def _failed(self, error: Exception) -> None:
        self._paused_until = time.monotonic() + PAUSE_SECONDS
        if self.available:
            self.available = False
            log.warning("cache.unavailable", reason=" ".join(str(error).split())[:200] or type(error).__name__)

    def _answered(self) -> None:
        if not self.available:
            self.available = True
            log.info("cache.available")
