"""Hidden states through one MoE layer, asked of a router: small requests gathered into one message, large ones cut."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import structlog

from services.gateway.gathering import Gathering, Member
from services.gateway.liveness import SILENT_SECONDS, Liveness
from services.router.messages import ForwardReply, ForwardRequest
from shared import subjects, wire
from shared.bus import BUDGET_MS, REQUEST_ID, Bus, Headers, NoRespondersError
from shared.checkpoint import ModelConfig
from shared.errors import BadMessageError, MoeError
from shared.instrumentation import BAD_MESSAGES
from shared.logs import request_id
from shared.replicas import ANYTHING, Replicas
from shared.settings import GatewaySettings

log = structlog.get_logger()

OVERHEAD_BYTES = 4096
RETRY_PAUSE_SECONDS = 0.1
MOST_LOSSES = 5
"""So many routers may be lost over one request: one that kills them must not go round for ever."""
LOST = frozenset({"router_unavailable", "bus_unavailable", "draining"})
Array = npt.NDArray[np.generic]


class Answer(NamedTuple):
    """What a layer says of T rows."""

    hidden_states: Array
    """[T, H] float32"""
    top_k_index: Array
    """[T, k] int64: each row's experts."""
    top_k_weights: Array
    """[T, k] float32"""
    degraded: bool = False
    """Some experts were left out (DEGRADED_MODE=skip)."""

    def rows(self, start: int, end: int) -> Answer:
        """Those from `start` to before `end`."""
        index, weights = self.top_k_index[start:end], self.top_k_weights[start:end]
        return Answer(self.hidden_states[start:end], index, weights, self.degraded)


class Waiting:
    """One request's rows, and where its answer goes."""

    __slots__ = ("answer", "hidden", "request_id")

    def __init__(self, hidden: Array, answer: asyncio.Future[Answer]) -> None:
        self.hidden = hidden
        self.answer = answer
        self.request_id = request_id.get()


class Forwards:
    """Asks routers for forward passes."""

    def __init__(
        self, bus: Bus, deployment: str, config: ModelConfig, routers: Replicas, settings: GatewaySettings
    ) -> None:
        self._bus = bus
        self._deployment = deployment
        self._routers = routers
        self._liveness = Liveness(bus, routers)
        self._config = config
        self._seconds = settings.timeout_seconds
        self._batch_rows = settings.forward_batch_rows
        self._wait_seconds = settings.forward_wait_ms / 1000
        self._limit = settings.max_concurrent_requests + settings.max_queued_requests
        self._outstanding = 0
        self._lines: dict[int, Gathering[Waiting]] = {}
        self._due: set[int] = set()
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._flights: set[asyncio.Task[None]] = set()

    @property
    def max_rows(self) -> int:
        """Rows that one message may carry, by the bus' limit."""
        row_bytes = 4 * self._config.hidden_size + 12 * self._config.num_experts_per_tok
        return max(1, (self._bus.max_payload - OVERHEAD_BYTES) // row_bytes)

    def is_small(self, hidden: Array) -> bool:
        """Whether `hidden` [T, H] may travel with others."""
        return len(hidden) < min(self._batch_rows, self.max_rows)

    async def large(self, layer: int, hidden: Array) -> Answer:
        """The answer for `hidden` [T, H] float32, by itself, in as many messages as the bus' limit asks for.

        Raises:
            MoeError: no router, no answer in time, or what the router says.

        """
        deadline = time.monotonic() + self._seconds
        rows = self.max_rows
        name = request_id.get()
        parts = [
            await self._ask(layer, hidden[start : start + rows], deadline, name)
            for start in range(0, hidden.shape[0], rows)
        ]
        log.info("forward.answered", id=name, layer=layer, rows=len(hidden), messages=len(parts))
        out, index, weights = (np.concatenate(each) for each in list(zip(*parts, strict=True))[:3])
        return Answer(out, index, weights, any(part.degraded for part in parts))

    async def small(self, layer: int, hidden: Array) -> Answer:
        """The answer for `hidden` [T, H] float32, which may travel with other requests' rows.

        Raises:
            MoeError: too many wait, no router, no answer in time, or what the router says.

        """
        if self._outstanding >= self._limit:
            raise MoeError("overloaded", f"{self._outstanding} forward requests are waiting; try again in a moment")
        line = self._lines.get(layer)
        if line is None:
            line = self._lines[layer] = Gathering(min(self._batch_rows, self.max_rows), self._wait_seconds)
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        member = Member(hidden.shape[0], time.monotonic(), Waiting(hidden, answer))
        line.join(member)
        self._outstanding += 1
        self._soon(layer)
        try:
            return await answer
        except asyncio.CancelledError:
            line.leave(member)
            raise
        finally:
            self._outstanding -= 1

    def _soon(self, layer: int) -> None:
        """Send what is due once everything that has arrived by now has joined."""
        if layer not in self._due:
            self._due.add(layer)
            asyncio.get_running_loop().call_soon(self._send_due, layer)

    def _send_due(self, layer: int) -> None:
        self._due.discard(layer)
        line, now = self._lines[layer], time.monotonic()
        again = line.look(now)
        while batch := line.take(now):
            task = asyncio.create_task(self._fly(layer, line, batch), name=f"forward:{layer}")
            self._flights.add(task)
            task.add_done_callback(self._flights.discard)
            again = line.look(now)
        timer = self._timers.pop(layer, None)
        if timer is not None:
            timer.cancel()
        if again is not None:
            delay = max(0.0, again - now)
            self._timers[layer] = asyncio.get_running_loop().call_later(delay, self._send_due, layer)

    async def _fly(self, layer: int, line: Gathering[Waiting], batch: list[Member[Waiting]]) -> None:
        """Ask for `batch` and hand out its answer, or to each the error."""
        waiting = [member.payload for member in batch]
        try:
            if len(batch) == 1:
                hidden, name = waiting[0].hidden, waiting[0].request_id
            else:
                hidden, name = np.concatenate([each.hidden for each in waiting]), f"forward-{uuid.uuid4().hex}"
            answer = await self._ask(layer, hidden, batch[0].since + self._seconds, name)
            ids = ",".join([each.request_id for each in waiting])
            log.info("forward.answered", id=name, layer=layer, rows=len(hidden), messages=1, request_id=ids)
            start = 0
            for member in batch:
                end = start + member.rows
                if not member.payload.answer.done():
                    member.payload.answer.set_result(answer.rows(start, end))
                start = end
        except Exception as error:  # whatever it is, nobody may be left waiting
            if not isinstance(error, MoeError):
                log.exception("forward.failed")
                error = MoeError("internal_error", "internal error; see the gateway's log")
            for each in waiting:
                if not each.answer.done():
                    each.answer.set_exception(MoeError(error.code, error.message, param=error.param))
        finally:
            for each in waiting:
                each.answer.cancel()  # only where the gateway closes; else all are done
            line.came_back(batch, time.monotonic())
            self._soon(layer)

    async def _ask(self, layer: int, hidden: Array, deadline: float, name: str) -> Answer:
        """One message and its reply, asked of another router when one is lost."""
        message = ForwardRequest(layer=layer, hidden_states=wire.Tensor.from_numpy(hidden))
        data, losses = wire.encode(message), 0
        while True:
            now = time.monotonic()
            instance = self._routers.choose(ANYTHING, now)
            headers = {REQUEST_ID: name, BUDGET_MS: f"{(deadline - now) * 1000:.0f}"}
            try:
                return self._answer(await self._reply(instance, data, deadline, headers), hidden.shape[0])
            except MoeError as error:
                if isinstance(error, BadMessageError):
                    BAD_MESSAGES.labels("reply").inc()
                    error = MoeError("router_unavailable", f"the router's answer is none: {error.message}")
                losses += error.code == "router_unavailable" and not isinstance(error, NoRespondersError)
                lost = error.code in LOST and losses <= MOST_LOSSES
                if not lost or time.monotonic() + RETRY_PAUSE_SECONDS >= deadline:
                    if isinstance(error, NoRespondersError):
                        raise MoeError("router_unavailable", "no router is ready; try again in a moment") from None
                    raise error from None
                if error.code == "draining" and instance is not None:
                    self._routers.gone(instance)
                cut_off = error.code == "bus_unavailable"
            if (
                cut_off
                or self._routers.choose(ANYTHING, time.monotonic(), () if instance is None else (instance,)) is None
            ):
                await asyncio.sleep(RETRY_PAUSE_SECONDS)

    def _answer(self, data: bytes, rows: int) -> Answer:
        """What is in a router's reply to `rows` rows.

        Raises:
            BadMessageError: it is no such reply.

        """
        reply = wire.decode(ForwardReply, data)
        h, k = self._config.hidden_size, self._config.num_experts_per_tok
        for part, dtype, shape in (
            (reply.hidden_states, "float32", (rows, h)),
            (reply.top_k_index, "int64", (rows, k)),
            (reply.top_k_weights, "float32", (rows, k)),
        ):
            if (part.dtype, part.shape) != (dtype, shape):
                raise BadMessageError(f"{part.dtype} {list(part.shape)} is not {dtype} {list(shape)}")
        out, index, weights = (
            part.to_numpy() for part in (reply.hidden_states, reply.top_k_index, reply.top_k_weights)
        )
        return Answer(out, index, weights, reply.degraded)

    async def _reply(self, instance: str | None, data: bytes, deadline: float, headers: Headers) -> bytes:
        """The answer of the router `instance`, or of any, to one sending.

        Raises:
            MoeError: `router_unavailable`, as soon as the router is known to be gone; or what it says.

        """
        subject = subjects.forward(self._deployment, instance or "")
        with self._bus.exchange(1, headers) as exchange:
            exchange.send(0, subject, data)
            while not await exchange.wait(min(deadline, time.monotonic() + SILENT_SECONDS)):
                for _, error in exchange.take_errors():
                    if isinstance(error, NoRespondersError) and instance is not None:
                        self._routers.gone(instance)
                    raise error
                if time.monotonic() >= deadline:
                    raise MoeError("deadline_exceeded", f"no answer on {subject} within {self._seconds:.3g} s")
                if instance is not None:
                    await self._check(instance)
            return bytes(exchange.answers[0])

    async def _check(self, instance: str) -> None:
        """Find out whether the router is still there."""
        try:
            await self._liveness.generations(instance, [])
        except MoeError as error:
            if error.code == "router_unavailable":
                self._routers.failed(instance, time.monotonic())
                raise

    async def close(self) -> None:
        """End what is under way; to be called when no request is open."""
        for timer in self._timers.values():
            timer.cancel()
        flights = list(self._flights)
        for task in flights:
            task.cancel()
        await asyncio.gather(*flights, return_exceptions=True)
