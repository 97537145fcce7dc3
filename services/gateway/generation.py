"""One generation as the gateway sees it: asked of a router over NATS, decoded to text, cancelled when nobody reads."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass, field
from typing import Any

import msgspec
import structlog

from services.gateway.admission import Admission, Place
from services.gateway.answers import Answers
from services.gateway.liveness import Liveness, Watched
from services.gateway.progress import Progress
from services.gateway.report import Rate, Window
from services.gateway.text import IncrementalDecoder, StopStrings, TextTokenizer
from services.router.messages import CancelRequest, GenerateChunk, GenerateRequest, TokenLogprob
from shared import subjects, wire
from shared.bus import BUDGET_MS, REQUEST_ID, Bus, NoRespondersError, ReplyStream
from shared.errors import BadMessageError, MoeError
from shared.histogram import Histogram
from shared.instrumentation import (
    BAD_MESSAGES,
    E2E_LATENCY,
    GENERATION_TOKENS,
    INTER_TOKEN_LATENCY,
    PROMPT_TOKENS,
    REQUEST_SUCCESS,
    RESUMPTIONS,
    TIME_TO_FIRST_TOKEN,
)
from shared.logs import request_id
from shared.replicas import ANYTHING, Replicas

log = structlog.get_logger()

RETRY_PAUSE_SECONDS = 0.1
CANCEL_SECONDS = 2.0
RECONNECT_SECONDS = 10.0
"""A cancellation waits so long for a connection."""
ACCEPT_SECONDS = 1.0
"""A router says at once that it takes a request; one that does not is passed over. Doubled at each try."""
RETRYABLE = frozenset({"overloaded", "bus_unavailable", "draining"})
LOST = frozenset({"router_unavailable", "bus_unavailable", "draining", "cancelled", "chunk_lost", "bad_message"})
"""Errors in the middle of a stream after which another router can go on."""


@dataclass(frozen=True)
class Piece:
    """What one chunk adds to a generation: text at whole characters, and the tokens behind it."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    prompt_logprobs: list[TokenLogprob | None] | None = None
    routing: list[wire.Tensor] = field(default_factory=list)
    finish_reason: str | None = None
    degraded: bool = False


class Observations:
    """Real measurements for /metrics and /performance-report; label look-ups happen once, here."""

    def __init__(self, model_name: str, window: int = 4096) -> None:
        self.latencies = {"time_to_first_token": Histogram(), "inter_token": Histogram(), "end_to_end": Histogram()}
        self._histograms = tuple(self.latencies.values())
        self.errors: dict[str, int] = {}
        """Failed generations by code."""
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
            self._histograms[0].observe(now - arrival)
            self.first_token.add(now, now - arrival)
        else:
            self._between.observe(now - last)
            self._histograms[1].observe(now - last)
            self.between_tokens.add(now, now - last)
        self._tokens.inc()
        self.token_rate.add(now)
        self.tokens += 1

    def end(self, arrival: float, now: float, prompt_tokens: int, reason: str) -> None:
        self._whole.observe(now - arrival)
        self._histograms[2].observe(now - arrival)
        self.whole.add(now, now - arrival)
        self._prompt_tokens.inc(prompt_tokens)
        self.prompt_tokens += prompt_tokens
        REQUEST_SUCCESS.labels(self._model_name, reason).inc()
        self.finish_rate.add(now)
        self.finished += 1

    def fail(self, now: float, code: str) -> None:
        self.failure_rate.add(now)
        self.errors[code] = self.errors.get(code, 0) + 1
        self.failed += 1


def not_the_clients(error: MoeError) -> MoeError:
    """`error` as a client should hear it: what is wrong with a router's reply is no fault of the request."""
    if isinstance(error, BadMessageError):
        return MoeError("router_unavailable", f"the router's answer is none: {error.message}")
    return error


class _LostError(Exception):
    """A stream has ended before its last chunk, but not the generation."""

    def __init__(self, error: MoeError) -> None:
        super().__init__(error.message)
        self.error = error


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
        routers: Replicas,
        timeout_seconds: float,
    ) -> None:
        self._bus = bus
        self._deployment = deployment
        self._routers = routers
        self._liveness = Liveness(bus, routers)
        self._tokenizer = tokenizer
        self._admission = admission
        self._observations = observations
        self._answers = answers
        self._timeout_seconds = timeout_seconds
        self._farewells: set[asyncio.Task[None]] = set()

    async def generate(
        self, request: GenerateRequest, stops: list[str], place: Place | None = None
    ) -> AsyncGenerator[Piece, None]:
        """Pieces of one generation, the last with its finish reason; leaving early cancels it.

        It waits for `place`, or joins the line if it is given none.

        Raises:
            MoeError: no place, no router, no answer in time, or what the router says.

        """
        arrival = time.monotonic()
        try:
            async with (
                self._admission.slot() if place is None else place,
                contextlib.aclosing(self._pieces(request, stops, arrival)) as pieces,
            ):
                async for piece in pieces:
                    yield piece
        except MoeError as error:
            self._observations.fail(time.monotonic(), error.code)
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
                yield Piece(
                    text, chunk.token_ids, chunk.logprobs, chunk.prompt_logprobs, routing, reason, chunk.degraded
                )
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
                if chunk.finish_reason is not None and not chunk.degraded:
                    self._own(self._answers.keep(key, taken))
                yield chunk

    async def _from_router(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]:
        """A router's chunks, to the last; leaving early cancels the generation.

        When the router is lost, another goes on from the tokens so far.
        """
        progress = Progress(request)
        while True:
            try:
                async with contextlib.aclosing(self._try(progress)) as chunks:
                    async for chunk in chunks:
                        yield chunk
                        if chunk.finish_reason is not None:
                            return
            except _LostError as lost:
                error = lost.error
                if progress.complete:  # only who ends streams by an empty chunk can lose it so
                    yield GenerateChunk(id=request.id, finish_reason="length", degraded=progress.degraded)
                    return
                if isinstance(error, BadMessageError):
                    BAD_MESSAGES.labels("reply").inc()
                if not progress.lost():
                    raise not_the_clients(error) from None
                RESUMPTIONS.labels(error.code).inc()
                log.warning(
                    "generation.resumed",
                    id=request.id,
                    code=error.code,
                    reason=error.message,
                    tokens=len(progress.tokens),
                )

    async def _try(self, progress: Progress) -> AsyncGenerator[GenerateChunk, None]:
        """What one router says beyond what is known, to the last chunk.

        Raises:
            MoeError: what no other router would mend.
            _LostError: the rest has to come from another.

        """
        stream, accepted = await self._ask(progress)
        watched = Watched(accepted.id, accepted.instance, stream, time.monotonic(), tokens=len(progress.tokens))
        self._liveness.add(watched)
        finished = False
        try:
            with stream:
                while not finished:
                    try:
                        data = await stream.next(self._timeout_seconds)
                        chunk = wire.decode(GenerateChunk, data)
                        if chunk.id != accepted.id:
                            raise BadMessageError(f"a chunk of {chunk.id[:128]!r} is none of {accepted.id}")
                        chunk = progress.take(chunk)
                    except MoeError as error:
                        if error.code in LOST:
                            raise _LostError(error) from None
                        raise
                    watched.last_sign = time.monotonic()
                    watched.tokens = len(progress.tokens)
                    finished = chunk.finish_reason is not None
                    yield chunk
        except _LostError as lost:
            if lost.error.code == "router_unavailable":
                self._routers.failed(accepted.instance, time.monotonic())
            raise
        finally:
            self._liveness.remove(watched)
            if not finished:
                self._own(self._cancel(accepted.id, accepted.instance))

    async def _ask(self, progress: Progress) -> tuple[ReplyStream, GenerateChunk]:
        """Publish the request until a router takes it; its first, empty chunk says which one did."""
        deadline = time.monotonic() + self._timeout_seconds
        patience = ACCEPT_SECONDS
        refused_by: set[str] = set()
        while True:
            request = progress.next_try()
            now = time.monotonic()
            left = deadline - now
            instance = self._routers.choose(ANYTHING, now, refused_by)
            if instance is None and refused_by:
                refused_by.clear()
                instance = self._routers.choose(ANYTHING, now)
            headers = {REQUEST_ID: request_id.get() or request.id, BUDGET_MS: f"{left * 1000:.0f}"}
            stream, published = self._bus.open_stream(), False
            try:
                subject = subjects.generate(self._deployment, instance or "")
                await self._bus.publish(subject, wire.encode(request), reply=stream.inbox, headers=headers)
                published = True
                accepted = wire.decode(GenerateChunk, await stream.next(min(left, patience)))
                if instance is not None:
                    self._routers.answered(instance)
                if not subjects.is_token(accepted.instance):
                    raise BadMessageError("the first chunk of a stream must name its router")
                return stream, msgspec.structs.replace(accepted, id=request.id)
            except asyncio.CancelledError:  # the reader left; whoever takes the request should hear of it
                self._own(self._abandon(stream, request.id, deadline))
                raise
            except MoeError as error:
                late = error.code == "deadline_exceeded"
                cut_off = error.code == "bus_unavailable"
                if late or (cut_off and published):
                    self._own(self._abandon(stream, request.id, deadline))
                else:
                    stream.close()
                if late:
                    patience *= 2
                if instance is not None and not cut_off:
                    refused_by.add(instance)
                    if isinstance(error, NoRespondersError) or error.code == "draining":
                        self._routers.gone(instance)
                    elif late:
                        self._routers.failed(instance, time.monotonic())
                garbled = isinstance(error, BadMessageError)
                if garbled:
                    BAD_MESSAGES.labels("reply").inc()
                    if instance is not None:
                        self._own(self._cancel(request.id, instance))
                again = isinstance(error, NoRespondersError) or error.code in RETRYABLE or late or garbled
                if not again or time.monotonic() + RETRY_PAUSE_SECONDS >= deadline:
                    if isinstance(error, NoRespondersError):
                        raise MoeError("router_unavailable", "no router is ready; try again in a moment") from None
                    raise not_the_clients(error) from None
            if cut_off or self._routers.choose(ANYTHING, time.monotonic(), refused_by) is None:
                await asyncio.sleep(RETRY_PAUSE_SECONDS)

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
        subject, question = subjects.control("router", instance), wire.encode(CancelRequest(id=name))
        deadline = time.monotonic() + RECONNECT_SECONDS
        while True:
            try:
                await self._bus.request(subject, question, timeout=CANCEL_SECONDS)
            except MoeError as error:
                if error.code == "bus_unavailable" and time.monotonic() < deadline:
                    await asyncio.sleep(RETRY_PAUSE_SECONDS)
                    continue
                log.info("cancel.unanswered", id=name, code=error.code)
            return

    async def close(self) -> None:
        """Wait a moment for cancellations under way, then leave the rest to the routers, who notice our silence."""
        await self._liveness.close()
        if self._farewells:
            _, late = await asyncio.wait(self._farewells, timeout=CANCEL_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
