"""The answer cache with a real Redis: the same answer to the token, and no harm while Redis is away."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import msgspec
import pytest
from nats.aio.msg import Msg
from redis.asyncio import Redis

from services.gateway.answers import Answers, key_of
from services.nats_server import free_port
from services.router.messages import GenerateChunk, GenerateRequest, Sampling, TokenLogprob
from shared.errors import MoeError, StartError
from shared.settings import GatewaySettings, load
from tests.gateway.test_generation import Router, letters, saying, scripted
from tests.real_redis import RealRedis, needs_redis
from tests.running import wait_until

GREEDY = GenerateRequest(id="a", token_ids=[1, 2, 3], max_tokens=4, sampling=Sampling(temperature=0.0, seed=7))
CHUNKS = [
    GenerateChunk(id="a", token_ids=[5], logprobs=[TokenLogprob(5, -0.25, 1, [(5, -0.25)])]),
    GenerateChunk(id="a", token_ids=[6, 7], finish_reason="stop", stop_token_id=7),
]


@contextlib.asynccontextmanager
async def cache(port: int, deployment: str = "demo-1", **settings: object) -> AsyncIterator[Answers]:
    given = GatewaySettings.model_validate({"redis_url": f"redis://127.0.0.1:{port}", **settings})
    opened = Answers.open(given, deployment)
    try:
        yield opened
    finally:
        await opened.close()


def test_the_key_is_of_what_shapes_the_tokens_and_of_nothing_else() -> None:
    key = key_of("demo-1", GREEDY)
    assert key is not None
    same = msgspec.structs.replace(GREEDY, id="b", client="gateway-2", sampling=Sampling(temperature=0.0, seed=8))
    assert key_of("demo-1", same) == key
    assert key_of("demo-2", GREEDY) != key
    for change in (
        {"token_ids": [1, 2, 4]},
        {"max_tokens": 5},
        {"stop_token_ids": [9]},
        {"ignore_eos": True},
        {"logprobs": 2},
        {"prompt_logprobs": 0},
        {"return_routing": True},
        {"sampling": Sampling(temperature=0.0, repetition_penalty=1.5)},
        {"sampling": Sampling(temperature=0.0, logit_bias={3: 5.0})},
    ):
        assert key_of("demo-1", msgspec.structs.replace(GREEDY, **change)) not in {key, None}, change


def test_what_is_drawn_at_random_or_is_large_has_no_key() -> None:
    for change in ({"sampling": Sampling(temperature=0.5)}, {"return_logits": True}, {"return_prompt_logits": True}):
        assert key_of("demo-1", msgspec.structs.replace(GREEDY, **change)) is None


@needs_redis
async def test_a_kept_answer_comes_back_whole_and_from_another_gateway(redis: RealRedis) -> None:
    async with cache(redis.port) as one, cache(redis.port) as two:
        key = one.key(GREEDY)
        assert key is not None
        assert await one.find(key) is None
        await one.keep(key, CHUNKS)
        assert await two.find(key) == CHUNKS
        assert (one.hits, one.lookups, two.hits, two.lookups) == (0, 1, 1, 1)


@needs_redis
async def test_an_answer_expires(redis: RealRedis) -> None:
    async with cache(redis.port, cache_ttl_seconds=77) as kept, Redis(port=redis.port) as client:
        await kept.keep("k", CHUNKS)
        assert 70 < await client.ttl("k") <= 77


@needs_redis
@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x80", b"garbage" * 100, b"\x82\xa1v\x01\xa6chunks\x90"])
async def test_damaged_bytes_are_a_miss(redis: RealRedis, data: bytes) -> None:
    async with cache(redis.port) as kept, Redis(port=redis.port) as client:
        await client.set("k", data)
        assert await kept.find("k") is None
        assert kept.available


@needs_redis
async def test_an_answer_without_its_end_is_a_miss(redis: RealRedis) -> None:
    async with cache(redis.port) as kept:
        await kept.keep("k", CHUNKS[:1])
        assert await kept.find("k") is None


@needs_redis
async def test_a_redis_that_goes_and_comes_back(redis: RealRedis, capsys: pytest.CaptureFixture[str]) -> None:
    async with cache(redis.port) as kept:
        await kept.keep("k", CHUNKS)
        await redis.stop()
        for _ in range(3):
            assert await kept.find("k") is None
        await kept.keep("k", CHUNKS)
        assert "cache.unavailable" in capsys.readouterr().out, "it should be said"
        await redis.start()

        async def back() -> bool:
            await kept.keep("k", CHUNKS)
            return await kept.find("k") == CHUNKS

        await wait_until(back, "the cache to be used again")
        assert kept.available
    said = capsys.readouterr().out
    assert said.count("cache.unavailable") == 0, "only once"
    assert said.count("cache.available") == 1


@needs_redis
async def test_the_second_time_no_router_is_asked(nats_url: str, redis: RealRedis) -> None:
    script = saying(letters("ab"), letters("c"), letters("d!"))
    async with (
        cache(redis.port) as kept,
        scripted(nats_url, script, answers=kept) as (gateway, router),
    ):
        first = await gateway.pieces("one", temperature=0.0)
        await gateway.generator.close()  # the answer is kept beside; wait for it
        second = await gateway.pieces("two", temperature=0.0)
        stopped = await gateway.pieces("three", ["c"], temperature=0.0)
        drawn = await gateway.pieces("four")
    assert second == first == drawn
    assert "".join(piece.text for piece in stopped) == "ab"
    assert [request.id for request in router.asked] == ["one", "four"]
    assert (gateway.seen.finished, gateway.seen.tokens) == (4, 5 + 5 + 3 + 5)


@needs_redis
async def test_an_answer_that_was_cut_or_failed_is_not_kept(nats_url: str, redis: RealRedis) -> None:
    fail = False

    async def script(router: Router, message: Msg, request: GenerateRequest) -> None:
        await router.accept(message, request)
        await router.say(message, letters("ab"))
        if fail:
            router.bus.reply_error(message, MoeError("shard_unavailable", "expert shard 1 is unavailable"))
        else:
            await router.say(message, letters("cd"), "length")

    async with (
        cache(redis.port) as kept,
        Redis(port=redis.port) as client,
        scripted(nats_url, script, answers=kept) as (gateway, router),
    ):
        await gateway.pieces("stopped", ["b"], temperature=0.0)
        fail = True
        with pytest.raises(MoeError, match="shard 1"):
            await gateway.pieces("failed", temperature=0.0)
        await gateway.generator.close()
        assert await client.keys() == []
        assert len(router.asked) == 2


async def test_a_redis_that_never_was_costs_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    async with cache(free_port()) as kept:
        for _ in range(3):
            assert await kept.find("k") is None
        await kept.keep("k", CHUNKS)
    assert capsys.readouterr().out.count("cache.unavailable") == 1


async def test_switched_off_there_is_no_key() -> None:
    async with cache(1, enable_caching=False) as off:
        assert not off.enabled
        assert off.key(GREEDY) is None


@pytest.mark.parametrize(
    "url", ["localhost:6379", "http://localhost", "redis://localhost:port", "redis://:secret@host:port"]
)
def test_a_wrong_address_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("REDIS_URL", url)
    with pytest.raises(StartError, match=r"^REDIS_URL='\(hidden\)': must be"):
        load(GatewaySettings)
