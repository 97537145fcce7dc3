"""Answers that are known already: what a repeated greedy request gets from Redis instead of a router.

At temperature 0 a generation is a function of its request (docs/decisions/0005-numerics.md), so its chunks may be kept
and given again, to the token. Redis is never needed: while it does not answer, requests go to the routers.
"""

from __future__ import annotations

import contextlib
import hashlib

import msgspec
import structlog

from services.gateway.redis_client import RedisClient, RedisUnavailableError
from services.router.messages import GenerateChunk, GenerateRequest
from shared import wire
from shared.errors import BadMessageError
from shared.instrumentation import CACHE_LOOKUPS
from shared.settings import GatewaySettings

log = structlog.get_logger()

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

    def __init__(self, redis: RedisClient | None, deployment: str, ttl_seconds: int) -> None:
        self._redis = redis
        self._deployment = deployment
        self._ttl_seconds = ttl_seconds
        self._hit, self._miss, self._skipped = (CACHE_LOOKUPS.labels(r) for r in ("hit", "miss", "unavailable"))
        self.hits = 0
        self.lookups = 0

    @classmethod
    def open(cls, settings: GatewaySettings, deployment: str) -> Answers:
        """Use the Redis of REDIS_URL, which may come and go; nothing is sent yet."""
        redis = None
        if settings.redis_url and settings.enable_caching:
            redis = RedisClient(settings.redis_url, "cache")
        return cls(redis, deployment, settings.cache_ttl_seconds)

    @property
    def enabled(self) -> bool:
        return self._redis is not None

    @property
    def available(self) -> bool:
        """Whether there is a Redis that answered when it was last asked."""
        return self._redis is not None and self._redis.available

    def key(self, request: GenerateRequest) -> str | None:
        """The key to look up and to keep the answer by; None if this request has no repeatable answer."""
        return key_of(self._deployment, request) if self._redis is not None else None

    async def find(self, key: str) -> list[GenerateChunk] | None:
        """The chunks of a finished generation, or None: not there, damaged, or Redis does not answer."""
        self.lookups += 1
        if self._redis is None:
            self._skipped.inc()
            return None
        try:
            data = await self._redis.call(lambda redis: redis.get(key))
        except RedisUnavailableError:
            self._skipped.inc()
            return None
        chunks = self._decode(key, data) if isinstance(data, bytes) and data else None
        if chunks is None:
            self._miss.inc()
            return None
        self._hit.inc()
        self.hits += 1
        return chunks

    async def keep(self, key: str, chunks: list[GenerateChunk]) -> None:
        """Keep a finished generation for CACHE_TTL_SECONDS; a failure costs the next request the same work, no more."""
        data = wire.encode(Answer(chunks=chunks))
        if self._redis is None or len(data) > MAX_ANSWER_BYTES:
            return
        with contextlib.suppress(RedisUnavailableError):
            await self._redis.call(lambda redis: redis.set(key, data, ex=self._ttl_seconds))

    async def close(self) -> None:
        if self._redis is not None:
            await self._redis.close()

    def _decode(self, key: str, data: bytes) -> list[GenerateChunk] | None:
        try:
            chunks = wire.decode(Answer, data).chunks
        except BadMessageError as error:
            log.warning("cache.damaged", key=key, reason=error.message)
            return None
        return chunks if chunks and chunks[-1].finish_reason is not None else None
