"""One generation as the gateway sees it: asked of a router over NATS, decoded to text, cancelled when nobody reads."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass, field
from typing import Any

import msgspec
import structlog

from services.gateway.admission import Admission
from services.gateway.answers import Answers
from services.gateway.report import Rate, Window
from services.gateway.text import IncrementalDecoder, StopStrings, TextTokenizer
from services.router.messages import CancelRequest, GenerateChunk, GenerateRequest, TokenLogprob
from shared import subjects, wire
from shared.bus import BUDGET_MS, REQUEST_ID, Bus, NoRespondersError, ReplyStream
from shared.errors import MoeError
from shared.instrumentation import (
    E2E_LATENCY,
    GENERATION_TOKENS,
    INTER_TOKEN_LATENCY,
    PROMPT_TOKENS,
    REQUEST_SUCCESS,
    TIME_TO_FIRST_TOKEN,
)
from shared.logs import request_id

log = structlog.get_logger()

RETRY_PAUSE_SECONDS = 0.1
CANCEL_SECONDS = 2.0
RETRYABLE = frozenset({"overloaded", "bus_unavailable", "draining"})


@dataclass(frozen=True)
class Piece:
    """What one chunk adds to a generation: text at whole characters, and the tokens behind it."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    prompt_logprobs: list[TokenLogprob | None] | None = None
    routing: list[wire.Tensor] = field(default_factory=list)
    finish_reason: str | None = None


class Observations:
    """Real measurements for /metrics and /performance-report; label look-ups happen once, here."""

    def __init__(self, model_name: str, window: int = 4096) -> None:
        self.first_token = Window(window)
        self.between_tokens = Window(window)
        self.whole = Window(window)
        self._first = TIME_TO_FIRST_TOKEN.labels(model_name)
        self._between = INTER_TOKEN_LATENCY.labels(model_name)
        self._whole = E2E_LATENCY.labels(model_name)
        self._prompt_tokens = PROMPT_TOKENS.labels(model_name)
        self._tokens = GENERATION_TOKENS.labels(model_name)
        self._model_name = model_name
        self.token_rate = Rate()
        self.finish_rate = Rate()
        self.failure_rate = Rate()
        self.tokens = 0
        self.prompt_tokens = 0
        self.finished = 0
        self.failed = 0

    def token(self, arrival: float, last: float | None, now: float) -> None:
        if last is None:
            self._first.observe(now - arrival)
            self.first_token.add(now, now - arrival)
        else:
            self._between.observe(now - last)
            self.between_tokens.add(now, now - last)
        self._tokens.inc()
        self.token_rate.add(now)
        self.tokens += 1

    def end(self, arrival: float, now: float, prompt_tokens: int, reason: str) -> None:
        self._whole.observe(now - arrival)
        self.whole.add(now, now - arrival)
        self._prompt_tokens.inc(prompt_tokens)
        self.prompt_tokens += prompt_tokens
        REQUEST_SUCCESS.labels(self._model_name, reason).inc()
        self.finish_rate.add(now)
        self.finished += 1

    def fail(self, now: float) -> None:
        self.failure_rate.add(now)
        self.failed += 1


class Generator:
    """Asks routers for generations."""

    def __init__(
        self,
        bus: Bus,
        deployment: str,
        tokenizer: TextTokenizer,
        admission: Admission,
        observations: Observations,
        answers: Answers,
        timeout_seconds: float,
    ) -> None:
        self._bus = bus
        self._subject = subjects.generate(deployment)
        self._tokenizer = tokenizer
        self._admission = admission
        self._observations = observations
        self._answers = answers
        self._timeout_seconds = timeout_seconds
        self._farewells: set[asyncio.Task[None]] = set()

    async def generate(self, request: GenerateRequest, stops: list[str]) -> AsyncGenerator[Piece, None]:
        """Pieces of one generation, the last with its finish reason; leaving early cancels it.

        Raises:
            MoeError: no place, no router, no answer in time, or what the router says.

        """
        arrival = time.monotonic()
        try:
            async with (
                self._admission.slot(),
                contextlib.aclosing(self._pieces(request, stops, arrival)) as pieces,
            ):
                async for piece in pieces:
                    yield piece
        except MoeError:
            self._observations.fail(time.monotonic())
            raise

    async def _pieces(self, request: GenerateRequest, stops: list[str], arrival: float) -> AsyncGenerator[Piece, None]:
        decoder, stop_strings = IncrementalDecoder(self._tokenizer), StopStrings(stops)
        last: float | None = None
        async with contextlib.aclosing(self._chunks(request)) as chunks:
            async for chunk in chunks:
                now = time.monotonic()
                text, stopped = "", False
                for token in chunk.token_ids:
                    self._observations.token(arrival, last, now)
                    last = now
                    if token != chunk.stop_token_id:
                        shown, stopped = stop_strings.push(decoder.push(token))
                        text += shown
                        if stopped:
                            break
                if chunk.finish_reason is not None and not stopped:
                    shown, stopped = stop_strings.push(decoder.finish())
                    text += shown + ("" if stopped else stop_strings.finish())
                reason = "stop" if stopped else chunk.finish_reason
                routing = [chunk.routing] if chunk.routing else []
                if reason:
                    self._observations.end(arrival, now, len(request.token_ids), reason)
                yield Piece(text, chunk.token_ids, chunk.logprobs, chunk.prompt_logprobs, routing, reason)
                if reason:
                    return

    async def _chunks(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]:
        """The generation's chunks: known ones, or a router's, which are then kept."""
        key = self._answers.key(request)
        if key is None:
            source = self._from_router(request)
        elif (found := await self._answers.find(key)) is not None:
            for chunk in found:
                yield chunk
            return
        else:
            source = self._kept(key, request)
        async with contextlib.aclosing(source) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _kept(self, key: str, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]:
        """A router's chunks; once the last is there, all are on their way to the cache."""
        taken: list[GenerateChunk] = []
        async with contextlib.aclosing(self._from_router(request)) as chunks:
            async for chunk in chunks:
                taken.append(chunk)
                if chunk.finish_reason is not None:
                    self._own(self._answers.keep(key, taken))
                yield chunk

    async def _from_router(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]:
        """A router's chunks, to the last; leaving early cancels the generation."""
        stream, accepted = await self._ask(request)
        with stream:
            finished = False
            try:
                while not finished:
                    chunk = wire.decode(GenerateChunk, await stream.next(self._timeout_seconds))
                    finished = chunk.finish_reason is not None
                    if chunk.finish_reason == "cancelled":
                        raise MoeError("cancelled", "the router cancelled the generation")
                    yield chunk
            finally:
                if not finished:
                    self._own(self._cancel(accepted.id, accepted.instance))

    async def _ask(self, request: GenerateRequest) -> tuple[ReplyStream, GenerateChunk]:
        """Publish the request until a router takes it; its first, empty chunk says which one did.

        Each try has an id and an inbox of its own: of two routers that took two tries, only one is listened to.
        """
        deadline = time.monotonic() + self._timeout_seconds
        for attempt in itertools.count():
            name = f"{request.id}.{attempt}" if attempt else request.id
            data = wire.encode(msgspec.structs.replace(request, id=name))
            left = deadline - time.monotonic()
            headers = {REQUEST_ID: request_id.get() or request.id, BUDGET_MS: f"{left * 1000:.0f}"}
            stream = self._bus.open_stream()
            try:
                await self._bus.publish(self._subject, data, reply=stream.inbox, headers=headers)
                accepted = wire.decode(GenerateChunk, await stream.next(left))
                return stream, msgspec.structs.replace(accepted, id=name)
            except asyncio.CancelledError:  # the reader left; whoever takes the request should hear of it
                self._own(self._abandon(stream, name, deadline))
                raise
            except MoeError as error:
                if error.code == "bus_unavailable":
                    self._own(self._abandon(stream, name, deadline))
                else:
                    stream.close()
                retry = isinstance(error, NoRespondersError) or error.code in RETRYABLE
                if not retry or time.monotonic() + RETRY_PAUSE_SECONDS >= deadline:
                    if isinstance(error, NoRespondersError):
                        raise MoeError("router_unavailable", "no router is ready; try again in a moment") from None
                    raise
            await asyncio.sleep(RETRY_PAUSE_SECONDS)
        raise AssertionError("unreachable: the deadline ends the loop")

    def _own(self, farewell: Coroutine[Any, Any, None]) -> None:
        """Run `farewell` beside; it is ours, as the request's own task may be ending."""
        task = asyncio.create_task(farewell, name="farewell")
        self._farewells.add(task)
        task.add_done_callback(self._farewells.discard)

    async def _abandon(self, stream: ReplyStream, name: str, deadline: float) -> None:
        """Cancel a try at the router that takes it, if one still does."""
        with stream:
            while (left := deadline - time.monotonic()) > 0:
                try:
                    chunk = wire.decode(GenerateChunk, await stream.next(left))
                except MoeError as error:
                    if error.code == "bus_unavailable":
                        continue  # the answer may come after the reconnect
                    return
                if chunk.instance:
                    await self._cancel(name, chunk.instance)
                    return

    async def _cancel(self, name: str, instance: str) -> None:
        """Tell the router that nobody reads any more."""
        try:
            subject = subjects.control("router", instance)
            await self._bus.request(subject, wire.encode(CancelRequest(id=name)), timeout=CANCEL_SECONDS)
        except MoeError as error:
            log.info("cancel.unanswered", id=name, code=error.code)

    async def close(self) -> None:
        """Wait a moment for cancellations under way, then leave the rest to the routers, who notice our silence."""
        if self._farewells:
            _, late = await asyncio.wait(self._farewells, timeout=CANCEL_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
