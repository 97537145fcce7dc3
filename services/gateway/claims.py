"""Idempotent answers that gateways share through Redis: who computes one now, and what the finished ones are.

One key per Idempotency-Key holds either a claim, which lapses unless its gateway renews it, or an answer.
Claim by `SET NX PX`, change only what is one's own by a script: https://redis.io/docs/latest/commands/set/#patterns.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from typing import Annotated, Literal

import msgspec
import structlog
from redis.asyncio import Redis

from services.gateway.redis_client import RedisClient, RedisUnavailableError
from shared import wire
from shared.errors import BadMessageError

log = structlog.get_logger()

CLAIM_SECONDS = 5.0
"""After a gateway's death, another may compute the answer so much later."""
RENEW_SECONDS = 1.0

# Put ARGV[2] (nothing: delete) where ARGV[1] or nothing is, for ARGV[3] ms; what another gateway put there stays.
REPLACE = """
local held = redis.call('get', KEYS[1])
if held and held ~= ARGV[1] then return 0 end
if ARGV[2] == '' then redis.call('del', KEYS[1]) else redis.call('set', KEYS[1], ARGV[2], 'px', ARGV[3]) end
return 1
"""


class Entry(wire.Message, frozen=True, kw_only=True):
    """The value of one key: a claim (`running`), an answer, or the word that an answer was too large to keep."""

    state: Literal["running", "answered", "too_large"]
    fingerprint: bytes
    """Of the request: sha256."""
    owner: str
    """Names one computation."""
    request_id: str = ""
    status: Annotated[int, msgspec.Meta(ge=200, le=399)] = 200
    headers: list[tuple[bytes, bytes]] = []
    body: bytes = b""


class Claim:
    """One gateway's claim to compute one answer; what Redis holds of it lapses unless renewed."""

    def __init__(self, name: str, fingerprint: bytes, request_id: str) -> None:
        self.name = name
        self.entry = Entry(state="running", fingerprint=fingerprint, owner=secrets.token_hex(16), request_id=request_id)
        self.data = wire.encode(self.entry)


class Claims:
    """The claims and answers of one deployment in Redis, or none if there is no Redis."""

    def __init__(self, redis: RedisClient | None, deployment: str, ttl_seconds: int) -> None:
        self._redis = redis
        self._prefix = f"moe:{deployment}:idempotency:"
        self._ttl_seconds = ttl_seconds

    async def take(self, claim: Claim) -> Entry | None:
        """None if the answer is now this gateway's to compute; else another's claim, or the answer.

        While Redis does not answer, or holds something damaged, each gateway knows only its own requests.
        """
        if self._redis is None:
            return None
        key, lapse = self._prefix + claim.name, int(CLAIM_SECONDS * 1000)

        async def take(redis: Redis) -> bytes | None:
            for _ in range(2):  # what was there may lapse between the two commands
                if await redis.set(key, claim.data, nx=True, px=lapse):
                    return None
                found = await redis.get(key)
                if isinstance(found, bytes):
                    return found
            return None

        try:
            found = await self._redis.call(take)
            return wire.decode(Entry, found) if found is not None and found != claim.data else None
        except RedisUnavailableError:
            return None
        except BadMessageError as error:
            log.warning("idempotency.damaged", key=key, reason=error.message)
            return None

    @contextlib.asynccontextmanager
    async def renewed(self, claim: Claim) -> AsyncIterator[None]:
        """Keep a claim from lapsing."""

        async def renew() -> None:
            while True:
                await asyncio.sleep(RENEW_SECONDS)
                await self._replace(claim, claim.data, CLAIM_SECONDS)

        if self._redis is None:
            yield
            return
        task = asyncio.create_task(renew(), name=f"claim:{claim.name[:8]}")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def settle(
        self,
        claim: Claim,
        state: Literal["answered", "too_large"],
        status: int = 200,
        headers: list[tuple[bytes, bytes]] | None = None,
        body: bytes = b"",
    ) -> None:
        """Put the answer in the claim's place, for IDEMPOTENCY_TTL_SECONDS."""
        if self._redis is None:
            return
        entry = msgspec.structs.replace(claim.entry, state=state, status=status, headers=headers or [], body=body)
        await self._replace(claim, wire.encode(entry), self._ttl_seconds)

    async def release(self, claim: Claim) -> None:
        """Let whoever asks next compute anew."""
        await self._replace(claim, b"", 0)

    async def close(self) -> None:
        if self._redis is not None:
            await self._redis.close()

    async def _replace(self, claim: Claim, data: bytes, seconds: float) -> None:
        if self._redis is None:
            return
        key, lapse = self._prefix + claim.name, int(seconds * 1000)
        with contextlib.suppress(RedisUnavailableError):
            await self._redis.call(lambda redis: redis.register_script(REPLACE)([key], [claim.data, data, lapse]))
