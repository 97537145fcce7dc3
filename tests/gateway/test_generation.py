"""Generations over a real nats-server, asked of a router that a test scripts: text, retries, leaving, silence."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from nats.aio.msg import Msg

from services.gateway.admission import Admission
from services.gateway.answers import Answers
from services.gateway.generation import Generator, Observations, Piece
from services.gateway.progress import MOST_LOSSES
from services.router.messages import (
    CancelReply,
    CheckReply,
    CheckRequest,
    GenerateChunk,
    GenerateRequest,
    Sampling,
    decode_control,
)
from shared import subjects, wire
from shared.bus import BUDGET_MS, Bus
from shared.errors import MoeError
from shared.replicas import Replicas
from shared.status import Fleet
from tests.gateway.contexts import context
from tests.gateway.tokenizer_kinds import tokenizer
from tests.running import Watcher, wait_until

WORDS = tokenizer("bytes")
_names = itertools.count()

Script = Callable[["Router", Msg, GenerateRequest], Awaitable[None]]


def letters(text: str) -> list[int]:
    return WORDS.encode(text)


class Router:
    """Answers generate requests as `script` says; remembers what it was asked and what was cancelled."""

    def __init__(self, bus: Bus, script: Script) -> None:
        self.bus = bus
        self.script = script
        self.asked: list[GenerateRequest] = []
        self.headers: list[dict[str, str]] = []
        self.cancelled: list[str] = []
        self.checked = asyncio.Event()
        """Somebody has asked whether a generation is still here."""
        self.replies: dict[str, str] = {}
        """The inbox of each generation that was accepted."""
        self.told: dict[str, int] = {}
        """New tokens told, by inbox."""

    async def on_generate(self, message: Msg) -> None:
        request = wire.decode(GenerateRequest, message.data)
        self.asked.append(request)
        self.headers.append(dict(message.headers or {}))
        await self.script(self, message, request)

    async def on_control(self, message: Msg) -> None:
        request = decode_control(message.data)
        if isinstance(request, CheckRequest):
            known = {name: self.told[self.replies[name]] for name in request.ids if name in self.replies}
            await self.bus.reply(message, wire.encode(CheckReply(tokens=known)))
            self.checked.set()
            return
        self.cancelled.append(request.id)
        await self.bus.reply(message, wire.encode(CancelReply(found=True)))

    async def accept(self, message: Msg, request: GenerateRequest) -> None:
        self.replies[request.id] = message.reply
        self.told[message.reply] = len(request.output_ids)
        await self.bus.reply(message, wire.encode(GenerateChunk(id=request.id, instance=self.bus.instance)))

    async def say(self, message: Msg, tokens: list[int], finish: Any = None, **more: Any) -> None:
        start = self.told[message.reply]
        self.told[message.reply] += len(tokens)
        (name,) = [name for name, inbox in self.replies.items() if inbox == message.reply]
        chunk = GenerateChunk(id=name, token_ids=tokens, start=start, finish_reason=finish, **more)
        await self.bus.reply(message, wire.encode(chunk))


class Gateway:
    """A generator on a connection of its own."""

    def __init__(self, bus: Bus, deployment: str, timeout: float, answers: Answers) -> None:
        self.bus = bus
        self.admission = Admission(4, 100, timeout)
        self.seen = Observations("test-generation")
        self.routers = Replicas("router", deployment)
        self.generator = Generator(bus, deployment, WORDS, self.admission, self.seen, answers, self.routers, timeout)

    async def pieces(
        self, name: str = "g", stops: list[str] | None = None, tokens: int = 50, temperature: float = 1.0
    ) -> list[Piece]:
        sampling = Sampling(temperature=temperature)
        request = GenerateRequest(id=name, token_ids=[1, 2, 3], max_tokens=tokens, sampling=sampling)
        async with contextlib.aclosing(self.generator.generate(request, stops or [])) as pieces:
            return [piece async for piece in pieces]

    async def text(self, name: str = "g", stops: list[str] | None = None) -> tuple[str, str | None]:
        pieces = await self.pieces(name, stops)
        return "".join(piece.text for piece in pieces), pieces[-1].finish_reason


@contextlib.asynccontextmanager
async def scripted(
    nats_url: str, script: Script, timeout: float = 20, answers: Answers | None = None
) -> AsyncIterator[tuple[Gateway, Router]]:
    """A gateway's generator, and a router that answers it."""
    deployment = f"generation-{next(_names)}"
    async with contextlib.AsyncExitStack() as stack:
        buses = []
        for service in ("gateway", "router"):
            bus = await Bus.connect(nats_url, service, f"{service}-{deployment}")
            stack.push_async_callback(bus.abort)
            buses.append(bus)
        gateway = Gateway(buses[0], deployment, timeout, answers or Answers(None, deployment, 60))
        router = Router(buses[1], script)
        await router.bus.serve(subjects.generate(deployment), router.on_generate, workers=4)
        await router.bus.serve(subjects.control("router", router.bus.instance), router.on_control)
        await router.bus.flush()
        yield gateway, router
        await gateway.generator.close()
        assert (gateway.admission.running, gateway.admission.waiting) == (0, 0), "a place was lost"
        assert gateway.bus.waiting == 0, "an inbox was left open"


def saying(*chunks: list[int], finish: str = "length") -> Script:
    """Accept, then say these chunks, the last with the finish reason."""

    async def script(router: Router, message: Msg, request: GenerateRequest) -> None:
        await router.accept(message, request)
        for number, tokens in enumerate(chunks, start=1):
            await router.say(message, tokens, finish if number == len(chunks) else None)

    return script


async def say_one_and_wait(router: Router, message: Msg, request: GenerateRequest) -> None:
    await router.accept(message, request)
    await router.say(message, letters("a"))


async def test_tokens_become_text_at_whole_characters(nats_url: str) -> None:
    a, *smile = letters("a\U0001f600")
    async with scripted(nats_url, saying([a], *([byte] for byte in smile))) as (gateway, _router):
        pieces = await gateway.pieces()
    assert [piece.text for piece in pieces] == ["a", "", "", "", "\U0001f600"]
    assert [piece.finish_reason for piece in pieces] == [None, None, None, None, "length"]
    assert gateway.seen.tokens == 5
    assert gateway.seen.finished == 1
    assert gateway.seen.prompt_tokens == 3


async def test_the_token_that_ends_it_is_counted_but_is_no_text(nats_url: str) -> None:
    async def script(router: Router, message: Msg, request: GenerateRequest) -> None:
        await router.accept(message, request)
        await router.say(message, letters("a"))
        await router.say(message, letters("!"), "stop", stop_token_id=letters("!")[0])

    async with scripted(nats_url, script) as (gateway, _router):
        pieces = await gateway.pieces()
    assert "".join(piece.text for piece in pieces) == "a"
    assert sum(len(piece.token_ids) for piece in pieces) == 2
    assert pieces[-1].finish_reason == "stop"


async def test_an_unfinished_character_comes_with_the_end(nats_url: str) -> None:
    broken = letters("\U0001f600")[:2]
    async with scripted(nats_url, saying(*([byte] for byte in broken))) as (gateway, _router):
        assert await gateway.text() == (WORDS.decode(broken), "length")


@pytest.mark.parametrize("refusal", ["overloaded", "draining"])
async def test_a_router_that_refuses_is_asked_again(nats_url: str, refusal: str) -> None:
    async def script(router: Router, message: Msg, request: GenerateRequest) -> None:
        if len(router.asked) < 3:
            raise MoeError(refusal, "not now")
        await saying(letters("a"))(router, message, request)

    async with scripted(nats_url, script) as (gateway, router):
        assert await gateway.text() == ("a", "length")
        assert len(router.asked) == 3
        budgets = [int(headers[BUDGET_MS]) for headers in router.headers]
        assert budgets == sorted(budgets, reverse=True), "each try has what the last one left"


async def test_without_a_router_it_waits_within_its_time_then_says_so(nats_url: str, watcher: Watcher) -> None:
    alone = context(watcher.bus, Fleet(), served_model_name="nobody", timeout_seconds=0.3)
    request = GenerateRequest(id="g", token_ids=[1], max_tokens=1)
    with pytest.raises(MoeError, match="no router is ready") as caught:
        async for _ in alone.generator.generate(request, []):
            pass
    assert caught.value.code == "router_unavailable"
    assert alone.admission.running == 0
    assert alone.observations.failed == 1


async def test_an_error_that_a_retry_cannot_mend_is_raised_at_once(nats_url: str) -> None:
    async def script(router: Router, message: Msg, request: GenerateRequest) -> None:
        raise MoeError("context_length_exceeded", "too long")

    async with scripted(nats_url, script) as (gateway, router):
        with pytest.raises(MoeError, match="too long") as caught:
            await gateway.pieces()
        assert caught.value.code == "context_length_exceeded"
        assert len(router.asked) == 1


async def test_an_error_in_the_middle_is_raised_after_what_came_before(nats_url: str) -> None:
    async def script(router: Router, message: Msg, request: GenerateRequest) -> None:
        await router.accept(message, request)
        await router.say(message, letters("a"))
        raise MoeError("shard_unavailable", "expert shard 3 is unavailable")

    async with scripted(nats_url, script) as (gateway, _router):
        request = GenerateRequest(id="g", token_ids=[1], max_tokens=9)
        pieces = gateway.generator.generate(request, [])
        assert (await anext(pieces)).text == "a"
        with pytest.raises(MoeError, match="shard 3"):
            await anext(pieces)
        assert gateway.seen.failed == 1


async def test_leaving_early_cancels_at_the_router_that_took_it(nats_url: str) -> None:
    async with scripted(nats_url, say_one_and_wait) as (gateway, router):
        request = GenerateRequest(id="left", token_ids=[1], max_tokens=9)
        pieces = gateway.generator.generate(request, [])
        assert (await anext(pieces)).text == "a"
        assert gateway.admission.running == 1
        await pieces.aclose()
        assert gateway.admission.running == 0
        await wait_until(lambda: router.cancelled == ["left"], "the router to hear of it", 10)


async def test_a_reader_that_is_cancelled_cancels_too(nats_url: str) -> None:
    async with scripted(nats_url, say_one_and_wait) as (gateway, router):
        reading = asyncio.create_task(gateway.pieces("left"), name="read")
        await wait_until(lambda: gateway.seen.tokens, "the first token", 10)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await wait_until(lambda: router.cancelled == ["left"], "the router to hear of it", 10)


async def test_a_reader_that_leaves_before_the_router_has_answered_cancels_too(nats_url: str) -> None:
    answer = asyncio.Event()

    async def script(router: Router, message: Msg, request: GenerateRequest) -> None:
        await answer.wait()
        await say_one_and_wait(router, message, request)

    async with scripted(nats_url, script) as (gateway, router):
        reading = asyncio.create_task(gateway.pieces("left"), name="read")
        await wait_until(lambda: router.asked, "the router to be asked", 10)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        answer.set()
        await wait_until(lambda: router.cancelled == ["left"], "the router to hear of it", 3)


async def test_a_router_that_falls_silent_is_given_up_and_told(nats_url: str) -> None:
    async with scripted(nats_url, say_one_and_wait, timeout=0.3) as (gateway, router):
        with pytest.raises(MoeError) as caught:
            await gateway.pieces("silent")
        assert caught.value.code == "deadline_exceeded"
        await wait_until(lambda: router.cancelled == ["silent"], "the router to hear of it", 10)


async def test_a_generation_that_the_router_cancelled_by_itself_is_no_finished_text(nats_url: str) -> None:
    async with scripted(nats_url, saying([], finish="cancelled")) as (gateway, _router):
        with pytest.raises(MoeError):
            await gateway.pieces()
        assert gateway.seen.finished == 0


async def test_a_chunk_that_is_no_message_is_a_typed_error(nats_url: str) -> None:
    async def script(router: Router, message: Msg, request: GenerateRequest) -> None:
        await router.accept(message, request)
        await router.bus.reply(message, b"\xc1")

    async with scripted(nats_url, script) as (gateway, _router):
        with pytest.raises(MoeError) as caught:
            await gateway.pieces()
        assert caught.value.code == "router_unavailable", "no fault of the client's"


# -- stop strings ------------------------------------------------------------------------------------------------------


async def test_a_stop_string_ends_the_text_before_it_and_the_generation(nats_url: str) -> None:
    text = "one STOP two"
    async with scripted(nats_url, saying(*([token] for token in letters(text)))) as (gateway, router):
        assert await gateway.text("stopped", ["STOP"]) == ("one ", "stop")
        await wait_until(lambda: router.cancelled == ["stopped"], "the router to hear of it", 10)


async def test_a_stop_string_inside_a_chunk_of_several_tokens_ends_the_text_too(nats_url: str) -> None:
    async with scripted(nats_url, saying(letters("one STOP two"), letters(" three"))) as (gateway, _router):
        assert await gateway.text("stopped", ["STOP"]) == ("one ", "stop")


async def test_what_only_looked_like_a_stop_string_comes_with_the_end(nats_url: str) -> None:
    async with scripted(nats_url, saying(*([token] for token in letters("one STO")))) as (gateway, _router):
        assert await gateway.text("whole", ["STOP"]) == ("one STO", "length")


# -- a broken connection -----------------------------------------------------------------------------------------------


async def test_a_request_sent_twice_because_the_connection_broke_is_answered_once(nats_url: str) -> None:
    both = asyncio.Event()

    async def script(router: Router, message: Msg, request: GenerateRequest) -> None:
        # Both tries reach a router, and both are answered, as by two routers that know nothing of each other.
        if len(router.asked) == 2:
            both.set()
        await both.wait()
        await router.accept(message, request)
        for token in letters("abc"):
            await router.say(message, [token])
            await asyncio.sleep(0)
        await router.say(message, letters("d"), "length")

    async with scripted(nats_url, script) as (gateway, router):
        reading = asyncio.create_task(gateway.text(), name="read")
        await wait_until(lambda: router.asked, "the first try to arrive", 10)
        gateway.bus._client._transport._io_writer.transport.abort()
        await wait_until(lambda: len(router.asked) == 2 or reading.done(), "the second try to arrive", 10)
        both.set()
        assert await reading == ("abcd", "length")


# -- routers that are lost ---------------------------------------------------------------------------------------------


async def test_a_generation_goes_on_from_its_tokens_when_the_router_lets_it_go(nats_url: str) -> None:
    async def script(router: Router, message: Msg, request: GenerateRequest) -> None:
        await router.accept(message, request)
        rest = letters("abcdef")[len(request.output_ids) :]
        for token in rest[:2]:
            await router.say(message, [token])
        if len(rest) > 2:
            raise MoeError("draining", "the router is shutting down")
        await router.say(message, [], "length")

    async with scripted(nats_url, script) as (gateway, router):
        assert await gateway.text() == ("abcdef", "length")
        assert [request.output_ids for request in router.asked] == [letters(t) for t in ("", "ab", "abcd")]
        assert len({request.id for request in router.asked}) == 3, "each try has a name of its own"
        await wait_until(lambda: len(router.cancelled) == 2, "what may be left of the tries to be cancelled", 3)


async def test_a_chunk_that_was_lost_is_noticed_by_the_next_and_made_again(nats_url: str) -> None:
    async def script(router: Router, message: Msg, request: GenerateRequest) -> None:
        await router.accept(message, request)
        for token in letters("abcd")[len(request.output_ids) :]:
            if len(router.asked) == 1 and token == letters("b")[0]:
                router.told[message.reply] += 1  # said, but it never arrived
            else:
                await router.say(message, [token])
        await router.say(message, [], "length")

    async with scripted(nats_url, script) as (gateway, router):
        assert await gateway.text() == ("abcd", "length")
        assert [request.output_ids for request in router.asked] == [[], letters("a")]


async def test_a_last_chunk_that_was_lost_is_noticed_by_the_silence(nats_url: str) -> None:
    async def script(router: Router, message: Msg, request: GenerateRequest) -> None:
        await router.accept(message, request)
        if not request.output_ids:
            await router.say(message, letters("a"))
            del router.replies[request.id]  # it ended with a chunk that never arrived
            return
        await router.say(message, letters("b"), "length")

    async with scripted(nats_url, script) as (gateway, router):
        assert await gateway.text() == ("ab", "length")
        assert len(router.asked) == 2


async def test_a_router_that_works_in_silence_is_left_alone(nats_url: str) -> None:
    async def script(router: Router, message: Msg, request: GenerateRequest) -> None:
        await router.accept(message, request)
        await router.checked.wait()
        await router.say(message, letters("a"), "length")

    async with scripted(nats_url, script) as (gateway, router):
        assert await gateway.text() == ("a", "length")
        assert len(router.asked) == 1


async def test_a_request_that_routers_do_not_survive_does_not_go_round_for_ever(nats_url: str) -> None:
    async def script(router: Router, message: Msg, request: GenerateRequest) -> None:
        await router.accept(message, request)
        raise MoeError("draining", "the router is shutting down")

    async with scripted(nats_url, script) as (gateway, router):
        with pytest.raises(MoeError) as caught:
            await gateway.pieces()
        assert caught.value.code == "draining"
        assert len(router.asked) == MOST_LOSSES + 1


async def test_a_router_that_does_not_say_that_it_takes_a_request_is_passed_over(nats_url: str) -> None:
    stuck = asyncio.Event()

    async def script(router: Router, message: Msg, request: GenerateRequest) -> None:
        if len(router.asked) == 1:
            await stuck.wait()
        await saying(letters("a"))(router, message, request)

    async with scripted(nats_url, script) as (gateway, router):
        assert await gateway.text("g") == ("a", "length")
        assert len(router.asked) == 2
        stuck.set()
        await wait_until(
            lambda: router.cancelled == ["g"], "the first try to be cancelled when it is taken after all", 5
        )
