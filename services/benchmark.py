"""`openmoe bench`: load of many sizes against a running stack.

Closed loop: N streams, each sends its next request when the last has come back; it shows what the server can do.
Open loop: requests start when they are due, at random (Poisson), whether or not earlier ones have come back. Latency
counts from the scheduled send: a server that stalls cannot slow the load down and so hide its stall (which is known as
coordinated omission).
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from services.benchmark_figures import Mode, Row, row
from services.benchmark_http import Client, Refusal, TransferError
from services.benchmark_requests import (
    Request,
    Requests,
    Sample,
    ServedModel,
    Shape,
    arrivals,
    measure_text,
    send,
)
from shared.errors import StartError

MAX_IN_FLIGHT = 10_000
TOO_MANY = f"not sent: {MAX_IN_FLIGHT} requests were in flight"
PAUSE_AFTER_FAILURE_SECONDS = 0.1
"""A closed loop against a server that refuses at once must not become a flood."""
SHOW_SECONDS = 0.2
COLUMNS = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
CHECK_ROW, WARM_UP_ROW = 2**31, 2**31 + 1
"""Rows whose requests are never those of a measured row."""


@dataclass(frozen=True)
class Length:
    """How long a row goes on: for a time, or for a number of requests."""

    duration: float | None = None
    """Seconds; requests in flight at their end may finish."""
    requests: int | None = None

    def is_over(self, start: float, number: int) -> bool:
        """Whether request `number` is no longer sent."""
        late = self.duration is not None and time.perf_counter() >= start + self.duration
        return late or (self.requests is not None and number >= self.requests)


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    url: str
    shape: Shape = "completion"
    concurrency: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()
    """Requests per second."""
    length: Length = Length(duration=10.0)
    """Of each row."""
    prompt_tokens: int = 128
    max_tokens: int = 64
    layer: int | None = None
    timeout: float = 120.0
    warmup: int = 4
    seed: int = 0
    api_key: str | None = field(default=None, repr=False)


@dataclass
class Outcome:
    """What came of it."""

    model: ServedModel
    server_version: str | None
    rows: list[Row]
    interrupted: bool = False

    @property
    def failed(self) -> int:
        return sum(each.failed for each in self.rows)


@dataclass
class Traffic:
    """The requests of one row, as they come and go."""

    client: Client
    timeout: float
    samples: list[Sample] = field(default_factory=list)
    not_sent: Counter[str] = field(default_factory=Counter)
    in_flight: int = 0
    failed: int = 0

    async def send(self, request: Request, due: float) -> Sample:
        self.in_flight += 1
        try:
            sample = await send(self.client, request, due, self.timeout)
        finally:
            self.in_flight -= 1
        self.samples.append(sample)
        self.failed += sample.failure is not None
        return sample

    def refuse(self, reason: str) -> None:
        self.not_sent[reason] += 1
        self.failed += 1


Make = Callable[[int], Request]


async def closed_loop(traffic: Traffic, make: Make, streams: int, length: Length) -> tuple[float, float]:
    """Keep `streams` requests in flight; (start, seconds) of its window."""
    numbers = itertools.count()
    start = time.perf_counter()

    async def stream() -> None:
        while not length.is_over(start, number := next(numbers)):
            sample = await traffic.send(make(number), time.perf_counter())
            if sample.failure is not None:
                await asyncio.sleep(PAUSE_AFTER_FAILURE_SECONDS)

    async with asyncio.TaskGroup() as group:
        for number in range(streams):
            group.create_task(stream(), name=f"stream:{number}")
    return start, _window(traffic, start, length)


async def open_loop(traffic: Traffic, make: Make, next_in: Callable[[], float], length: Length) -> tuple[float, float]:
    """Send each request when it is due, `next_in` seconds after the last; (start, seconds) of its window."""
    start = due = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in itertools.count():
            due += next_in()
            if length.duration is not None and due >= start + length.duration:
                break
            if length.requests is not None and number >= length.requests:
                break
            request = make(number)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            if traffic.in_flight >= MAX_IN_FLIGHT:
                traffic.refuse(TOO_MANY)
            else:
                group.create_task(traffic.send(request, due), name=f"request:{number}")
    return start, _window(traffic, start, length)


def _window(traffic: Traffic, start: float, length: Length) -> float:
    """The duration that was asked for; without one, up to the last answer."""
    if length.duration is not None:
        return length.duration
    return max((s.ended for s in traffic.samples), default=start) - start


async def look_at(client: Client) -> tuple[ServedModel, str | None]:
    """What the server serves, and its version, if it tells one.

    Raises:
        StartError: it does not answer, or wants another key; the text says what to do.

    """
    try:
        async with asyncio.timeout(10):
            status, answer = await client.json("GET", "/v1/models")
            if isinstance(answer, Refusal):
                raise StartError(f"{client.url}: {advice(status, answer)}")
            try:
                model = msgspec.convert(answer["data"][0], ServedModel)
            except (msgspec.ValidationError, LookupError, TypeError):
                raise StartError(f"{client.url}: /v1/models lists no model; is it a gateway?") from None
            _, about = await client.json("GET", "/version")
    except TransferError as error:
        raise StartError(
            f"{client.url}: {error}; start a stack with `openmoe up`, or give its address with --url"
        ) from None
    except TimeoutError:
        raise StartError(f"{client.url}: not answered within 10 s; `openmoe status` shows who runs") from None
    return model, str(about["version"]) if isinstance(about, dict) and "version" in about else None


def advice(status: int, said: Refusal) -> str:
    """What to do about an answer that refuses."""
    text = f"HTTP {status}: {said.message or 'no text'}"
    if status in {401, 403}:
        return f"{text}; give the key with --api-key or API_AUTH_TOKEN"
    if status in {429, 503}:
        return f"{text}; wait until `openmoe smoke` passes"
    return text


async def prepare(plan: Plan, client: Client, model: ServedModel) -> Requests:
    """The maker of the requests, after one of them has come back and the warm-up is over.

    Raises:
        StartError: the model cannot hold such requests, or the server refuses one.

    """
    make = Requests(
        plan.shape,
        model,
        prompt_tokens=plan.prompt_tokens,
        max_tokens=plan.max_tokens,
        seed=plan.seed,
        layer=plan.layer,
    )
    if plan.shape == "chat":
        with suppress(TransferError, TimeoutError):  # then it is a guess
            async with asyncio.timeout(10):
                make.characters_per_token = await measure_text(client, model.id, plan.seed)
    traffic = Traffic(client, plan.timeout)
    first = await traffic.send(make(CHECK_ROW, 0), time.perf_counter())
    if first.failure is not None:
        said = Refusal(first.detail)
        text = advice(first.status, said) if first.status not in {0, 200} else f"{first.failure} {first.detail}".strip()
        raise StartError(f"{client.url}: the first request failed: {text}")
    if plan.warmup:
        streams = max((*plan.concurrency, 4))
        await closed_loop(traffic, lambda n: make(WARM_UP_ROW, n), streams, Length(requests=plan.warmup))
        if traffic.failed:
            failed = next(s for s in traffic.samples if s.failure is not None)
            raise StartError(
                f"{client.url}: a request of the warm-up failed: {failed.failure} {failed.detail}".rstrip()
            )
    return make


@asynccontextmanager
async def showing(progress: Progress, bar: TaskID, traffic: Traffic, length: Length) -> AsyncIterator[None]:
    """Keep a progress bar at what `traffic` does."""
    started = time.perf_counter()

    async def show() -> None:
        while True:
            done = len(traffic.samples)
            completed = done if length.requests else time.perf_counter() - started
            note = f"{done} done, {traffic.in_flight} in flight, {traffic.failed} failed"
            progress.update(bar, completed=completed, note=note)
            await asyncio.sleep(SHOW_SECONDS)

    task = asyncio.create_task(show(), name="progress")
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def measure(plan: Plan, traffic: Traffic, requests: Requests, number: int, load: float) -> Row:
    """Row `number`: `load` streams, or requests per second."""
    mode: Mode = "closed" if number < len(plan.concurrency) else "open"

    def make(n: int) -> Request:
        return requests(number, n)

    cpu, began = time.process_time(), time.perf_counter()
    if mode == "closed":
        start, seconds = await closed_loop(traffic, make, int(load), plan.length)
    else:
        start, seconds = await open_loop(traffic, make, arrivals(load, plan.seed + number), plan.length)
    share = (time.process_time() - cpu) / max(time.perf_counter() - began, 1e-9)
    samples, not_sent = traffic.samples, traffic.not_sent
    return row(mode, load, samples, start, seconds, generator_cpu=share, also_failed=not_sent)


async def run(plan: Plan, console: Console) -> Outcome:
    """Measure every row; Ctrl-C ends the run with the rows that were finished.

    Raises:
        StartError: nothing can be measured; the text says why and what to do.

    """
    client = Client(plan.url, plan.api_key)
    try:
        model, version = await look_at(client)
        outcome = Outcome(model, version, [])
        with Progress(*COLUMNS, console=console, disable=not console.is_terminal) as progress:
            warming = progress.add_task("warm-up", total=None, note=plan.shape)
            requests = await prepare(plan, client, model)
            progress.remove_task(warming)
            try:
                await _rows(plan, client, requests, progress, outcome)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or not outcome.rows:
                    raise
                task.uncancel()
                outcome.interrupted = True
    finally:
        client.close()
    return outcome


async def _rows(plan: Plan, client: Client, requests: Requests, progress: Progress, outcome: Outcome) -> None:
    loads = (*plan.concurrency, *plan.rates)
    for number, load in enumerate(loads):
        unit = "streams" if number < len(plan.concurrency) else "requests/s"
        total = plan.length.requests or plan.length.duration
        bar = progress.add_task(f"{number + 1}/{len(loads)}: {load:g} {unit}", total=total, note="")
        traffic = Traffic(client, plan.timeout)
        async with showing(progress, bar, traffic, plan.length):
            each = await measure(plan, traffic, requests, number, load)
        outcome.rows.append(each)
        note = f"{each.done} done, {each.failed} failed, {each.output_tokens_per_second:.1f} tokens/s"
        progress.update(bar, completed=total, note=note)
