"""One request of a load: what is sent, how its answer is read, and what is known of it afterwards.

`openmoe load` and `openmoe bench` both send with `send`.
"""

from __future__ import annotations

import asyncio
import random
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import numpy as np

from services.benchmark_http import Client, TransferError, refusal
from shared.errors import StartError

Shape = Literal["completion", "chat", "forward"]
SHAPES: tuple[Shape, ...] = ("completion", "chat", "forward")
FIRST_ID, UNKNOWN_VOCABULARY = 10, 1000
"""Ids below are often special tokens; a vocabulary that the server does not tell has at least so many."""
USAGE = (b'"usage":{', b'"usage": {')
BROKEN_OFF = "the answer ended without [DONE]"
CHARACTERS_PER_TOKEN = 3.0
"""Of a server that cannot tell (no /tokenize)."""


class ServedModel(msgspec.Struct):
    """An entry of /v1/models; None: this server does not say."""

    id: str
    max_model_len: int | None = None
    vocab_size: int | None = None
    hidden_size: int | None = None
    moe_layers: list[int] | None = None


@dataclass(frozen=True)
class Request:
    """One request, ready to be sent."""

    path: str
    body: bytes
    streamed: bool = True
    content_type: str = "application/json"
    input_tokens: int = 0
    """Of a forward request; a completion's are what the server says."""


@dataclass(slots=True)
class Sample:
    """One request as it went. Times are seconds of `time.perf_counter`."""

    due: float
    """When it was to be sent; latency counts from here."""
    sent: float
    ended: float = 0.0
    events: array[float] = field(default_factory=lambda: array("d"))
    """When each event came that carried tokens."""
    input_tokens: int = 0
    output_tokens: int = 0
    failure: str | None = None
    """Why it failed, in words that are the same for the same reason."""
    detail: str = ""
    """What the server said about it."""
    status: int = 0
    """HTTP's, once it came."""


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class Answer(msgspec.Struct):
    """The part of an answer, or of a stream's last event, that is read."""

    choices: list[msgspec.Raw]
    usage: Usage


class StreamReader:
    """Reads server-sent events: a time for each, JSON only of the one that has the usage."""

    def __init__(self, sample: Sample) -> None:
        self._sample = sample
        self._rest = b""
        self._done = False

    def take(self, piece: bytes) -> None:
        """The next piece of the body; almost always exactly one event."""
        now = time.perf_counter()
        if self._rest:
            piece, self._rest = self._rest + piece, b""
        *events, self._rest = piece.split(b"\n\n")
        for event in events:
            if event.startswith(b"data: {"):
                if event.startswith(b'data: {"error"') or any(mark in event for mark in USAGE):
                    self._read(event[6:], now)
                else:
                    self._sample.events.append(now)
            elif event == b"data: [DONE]":
                self._done = True

    def _read(self, event: bytes, now: float) -> None:
        if event.startswith(b'{"error"'):
            _refuse(self._sample, "in the stream", event)
            return
        try:
            answer = msgspec.json.decode(event, type=Answer)
        except msgspec.MsgspecError as error:
            self._sample.failure = f"the stream has an event that cannot be read: {error}"
            return
        _count(self._sample, answer.usage)
        if answer.choices:
            self._sample.events.append(now)

    def end(self) -> None:
        if self._sample.failure is None and not self._done:
            self._sample.failure = BROKEN_OFF


class WholeReader:
    """Reads an answer that comes as one: JSON with the usage, or bytes that are only counted."""

    def __init__(self, sample: Sample, request: Request) -> None:
        self._sample = sample
        self._json = request.content_type == "application/json"
        self._expected = 0 if self._json else len(request.body)
        self._pieces: list[bytes] = []

    def take(self, piece: bytes) -> None:
        self._pieces.append(piece)

    def end(self) -> None:
        body = b"".join(self._pieces)
        if not self._json:
            if len(body) != self._expected:
                self._sample.failure = f"{self._expected} bytes were expected, {len(body)} came"
            return
        try:
            _count(self._sample, msgspec.json.decode(body, type=Answer).usage)
        except msgspec.MsgspecError as error:
            self._sample.failure = f"the answer cannot be read: {error}"


def _count(sample: Sample, usage: Usage) -> None:
    sample.input_tokens, sample.output_tokens = usage.prompt_tokens, usage.completion_tokens


def _refuse(sample: Sample, where: str, body: bytes) -> None:
    said = refusal(body)
    sample.failure = f"{where}: {said.code}" if said.code else where
    sample.detail = said.message


async def send(client: Client, request: Request, due: float, timeout: float) -> Sample:
    """Send one request and read its answer to the end; whatever goes wrong is in the sample."""
    sample = Sample(due, time.perf_counter(), input_tokens=request.input_tokens)
    reader = StreamReader(sample) if request.streamed else WholeReader(sample, request)
    try:
        async with asyncio.timeout(timeout):
            status, refused = await client.ask("POST", request.path, request.body, reader.take, request.content_type)
        sample.status = status
        if status == 200:
            reader.end()
        else:
            _refuse(sample, f"HTTP {status}", refused)
    except TimeoutError:
        sample.failure = f"not answered within {timeout:g} s"
    except TransferError as error:
        sample.failure = str(error)
    sample.ended = time.perf_counter()
    return sample


def generation(
    path: str, prompt: dict[str, Any], model: str | None, max_tokens: int, *, stream: bool = True
) -> Request:
    """A request for exactly `max_tokens` tokens; `prompt` is the body's field with the prompt."""
    body = {**prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": stream}
    if model is not None:
        body["model"] = model
    if stream:
        body["stream_options"] = {"include_usage": True}
    return Request(path, msgspec.json.encode(body), streamed=stream)


class Requests:
    """Makes a run's requests: request `number` of row `row` is always the same, and no two are alike."""

    def __init__(
        self, shape: Shape, model: ServedModel, *, prompt_tokens: int, max_tokens: int, seed: int, layer: int | None
    ) -> None:
        """Check what is asked for against the model.

        Args:
            shape: which endpoint.
            model: what the server says of its model.
            prompt_tokens: tokens of each prompt; rows of hidden states for forward.
            max_tokens: tokens of each answer.
            seed: of the prompts.
            layer: for forward: the MoE layer; None: the model's first.

        Raises:
            StartError: the model cannot hold it, or has no such layer.

        """
        self._model, self._shape, self._seed = model, shape, seed
        self._prompt_tokens, self._max_tokens = prompt_tokens, max_tokens
        self.characters_per_token = CHARACTERS_PER_TOKEN
        self._layer = 0
        if shape == "forward":
            if not model.hidden_size or not model.moe_layers:
                raise StartError("--shape forward needs an OpenMoE gateway: this server tells no hidden_size")
            self._layer = model.moe_layers[0] if layer is None else layer
            if self._layer not in model.moe_layers:
                raise StartError(f"--layer {layer}: has no experts; those that have: {model.moe_layers}")
        elif model.max_model_len and prompt_tokens + max_tokens > model.max_model_len:
            raise StartError(
                f"--prompt-tokens {prompt_tokens} and --max-tokens {max_tokens} exceed the {model.max_model_len} "
                f"tokens that {model.id} can hold; lower one of them"
            )

    def __call__(self, row: int, number: int) -> Request:
        """The request `number` of a row."""
        return _MAKERS[self._shape](self, np.random.default_rng((self._seed, row, number)))

    def completion(self, draw: np.random.Generator) -> Request:
        """Random token ids, exactly as many as asked for."""
        size = self._model.vocab_size or UNKNOWN_VOCABULARY
        ids = draw.integers(min(FIRST_ID, size - 1), size, self._prompt_tokens).tolist()
        return generation("/v1/completions", {"prompt": ids}, self._model.id, self._max_tokens)

    def chat(self, draw: np.random.Generator) -> Request:
        """One message of random words, of about as many tokens as asked for."""
        text = words(draw, max(1, round(self._prompt_tokens * self.characters_per_token)))
        messages = [{"role": "user", "content": text}]
        return generation("/v1/chat/completions", {"messages": messages}, self._model.id, self._max_tokens)

    def forward(self, draw: np.random.Generator) -> Request:
        """Random hidden states [T, H], float32."""
        size = self._model.hidden_size or 0
        states = draw.standard_normal((self._prompt_tokens, size), dtype=np.float32)
        path = f"/v1/moe/forward?layer={self._layer}"
        body = states.astype("<f4", copy=False).tobytes()
        return Request(path, body, False, "application/octet-stream", self._prompt_tokens)


_MAKERS: dict[Shape, Callable[[Requests, np.random.Generator], Request]] = {
    "completion": Requests.completion,
    "chat": Requests.chat,
    "forward": Requests.forward,
}


def words(draw: np.random.Generator, characters: int) -> str:
    """Random lower-case words, `characters` long together."""
    letters = draw.integers(ord("a"), ord("z") + 1, characters).astype(np.uint8)
    letters[5::6] = ord(" ")
    return letters.tobytes().decode()


async def measure_text(client: Client, model: str, seed: int) -> float:
    """Characters per token of the words that `words` makes, by the server's own /tokenize.

    Raises:
        TransferError: the connection broke.

    """
    text = words(np.random.default_rng((seed, 0xC0FFEE)), 3000)
    status, answer = await client.json("POST", "/tokenize", {"model": model, "prompt": text})
    if status != 200 or not isinstance(answer, dict) or not isinstance(answer.get("count"), int) or answer["count"] < 1:
        return CHARACTERS_PER_TOKEN
    return len(text) / float(answer["count"])


def arrivals(rate: float, seed: int) -> Callable[[], float]:
    """Seconds to the next request of a Poisson process, one after the other."""
    draw = random.Random(seed)  # noqa: S311 - arrival times, not secrets
    return lambda: draw.expovariate(rate)
