"""The load of `openmoe chaos`: requests whose answers are known, streamed again and again, and compared."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from services.benchmark_http import Client, TransferError, refusal
from services.load import PROMPTS

LOGPROB_TOLERANCE = 1e-4
"""Prefill and decode add in the same order (docs/decisions/0005), so that no difference is expected at all."""
PAUSE_AFTER_FAILURE_SECONDS = 0.1
SHOWN_CHARACTERS = 40
END = "data: [DONE]"


@dataclass(frozen=True)
class Question:
    """One request; its answer is always the same."""

    name: str
    path: str
    body: bytes


def questions(seed: int, count: int, max_tokens: int) -> list[Question]:
    """`count` streamed requests, no two alike, of all the ways in which a stream can be asked for.

    Greedy, seeded with penalties, stop strings, logprobs, chat, two choices, echo with logprobs, and token ids.
    """
    draw = random.Random(seed)  # noqa: S311 - prompts, not secrets
    completions, chat = "/v1/completions", "/v1/chat/completions"
    result = []
    for number in range(count):
        text = f"# {draw.randrange(10**6)}\n{PROMPTS[number % len(PROMPTS)]}"
        sampled = {"temperature": 0.9, "top_p": 0.95, "seed": draw.randrange(2**31)}
        penalties = {"presence_penalty": 0.4, "frequency_penalty": 0.3, "repetition_penalty": 1.1}
        message = [{"role": "user", "content": text}]
        ids = [draw.randrange(10, 250) for _ in range(12)]
        kinds: list[tuple[str, str, dict[str, Any]]] = [
            ("greedy", completions, {"prompt": text, "temperature": 0}),
            ("penalties", completions, {"prompt": text, **sampled, **penalties}),
            ("stop", completions, {"prompt": text, **sampled, "stop": ["\n\n", "return", "self."], "logprobs": 0}),
            ("logprobs", completions, {"prompt": text, "temperature": 0, "logprobs": 3}),
            ("chat", chat, {"messages": message, **sampled, "logprobs": True, "top_logprobs": 2}),
            ("choices", completions, {"prompt": text, **sampled, "n": 2}),
            ("echo", completions, {"prompt": text, "temperature": 0, "echo": True, "logprobs": 1}),
            ("ids", completions, {"prompt": ids, **sampled, "top_k": 40}),
        ]
        name, path, asked = kinds[number % len(kinds)]
        body = {**asked, "max_tokens": max_tokens, "stream": True, "stream_options": {"include_usage": True}}
        body["ignore_eos"] = name != "stop"
        result.append(Question(f"{name} {number}", path, msgspec.json.encode(body)))
    return result


@dataclass
class Choice:
    """One choice of an answer, put together from its stream."""

    text: str = ""
    logprobs: list[Any] = field(default_factory=list)
    """As they came, one entry for each token."""
    finish_reason: str | None = None


@dataclass
class Answer:
    """Everything of a streamed answer that must always be the same."""

    choices: dict[int, Choice] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0


class StreamReader:
    """Reads server-sent events into an answer, and notes when each with tokens came."""

    def __init__(self) -> None:
        self.answer = Answer()
        self.times: list[float] = []
        """Of `time.monotonic`."""
        self.failure = ""
        self.done = False
        self._rest = b""

    def take(self, piece: bytes) -> None:
        """The next piece of the body."""
        now = time.monotonic()
        *events, self._rest = (self._rest + piece).split(b"\n\n")
        for event in events:
            line = event.decode(errors="replace")
            if line == END:
                self.done = True
            elif line.startswith("data: "):
                try:
                    self._read(msgspec.json.decode(line[6:]), now)
                except (msgspec.MsgspecError, LookupError, TypeError, AttributeError) as error:
                    self.failure = self.failure or f"an event cannot be read: {error!r}"

    def _read(self, event: dict[str, Any], now: float) -> None:
        if "error" in event:
            error = event["error"]
            self.failure = self.failure or f"in the stream: {error.get('code')}: {error.get('message')}"
            return
        if event.get("usage"):
            self.answer.prompt_tokens = event["usage"]["prompt_tokens"]
            self.answer.completion_tokens = event["usage"]["completion_tokens"]
        for given in event["choices"]:
            choice = self.answer.choices.setdefault(given["index"], Choice())
            choice.text += given["text"] if "text" in given else given["delta"].get("content") or ""
            choice.logprobs += _logprobs(given.get("logprobs"))
            choice.finish_reason = given.get("finish_reason") or choice.finish_reason
        if event["choices"]:
            self.times.append(now)


def _logprobs(given: dict[str, Any] | None) -> list[Any]:
    if not given:
        return []
    if "content" in given:
        return list(given["content"] or [])
    return list(zip(given["tokens"], given["token_logprobs"], given["top_logprobs"] or [], strict=False))


@dataclass
class Asked:
    """One request as it went. Times are of `time.monotonic`."""

    question: int
    sent: float
    ended: float = 0.0
    times: list[float] = field(default_factory=list)
    """When each event with tokens came."""
    tokens: int = 0
    failure: str = ""
    wrong: str = ""
    """How the answer differs from the undisturbed one."""

    def waits(self) -> list[tuple[float, float]]:
        """(from, to) of each wait for the next event; the first one's from the sending on."""
        return list(itertools.pairwise([self.sent, *self.times, *([self.ended] if self.failure else [])]))


async def ask(
    client: Client, question: Question, number: int, timeout: float, reader: StreamReader | None = None
) -> tuple[Asked, Answer]:
    """Send one request and read its stream to the end; whatever goes wrong is in what is returned."""
    asked, reader = Asked(number, time.monotonic()), reader or StreamReader()
    try:
        async with asyncio.timeout(timeout):
            status, refused = await client.ask("POST", question.path, question.body, reader.take)
        if status != 200:
            said = refusal(refused)
            asked.failure = f"HTTP {status}: {said.code}: {said.message}"
        else:
            asked.failure = reader.failure or ("" if reader.done else "the answer ended without [DONE]")
    except TimeoutError:
        asked.failure = f"not answered within {timeout:g} s"
    except TransferError as error:
        asked.failure = reader.failure or str(error)
    asked.ended = time.monotonic()
    asked.times, asked.tokens = reader.times, reader.answer.completion_tokens
    return asked, reader.answer


def difference(expected: Answer, came: Answer) -> str:
    """How `came` differs from `expected`, in words; empty if it does not."""
    if sorted(expected.choices) != sorted(came.choices):
        return f"choices {sorted(came.choices)} in place of {sorted(expected.choices)}"
    for index, wanted in sorted(expected.choices.items()):
        got, where = came.choices[index], f"choice {index}: "
        if got.text != wanted.text:
            return where + _text_difference(wanted.text, got.text)
        if len(got.logprobs) != len(wanted.logprobs):
            kind = "missing" if len(got.logprobs) < len(wanted.logprobs) else "repeated"
            return f"{where}{kind} tokens: {len(got.logprobs)} logprobs in place of {len(wanted.logprobs)}"
        apart = [_apart(a, b) for a, b in zip(wanted.logprobs, got.logprobs, strict=True)]
        if apart and max(apart) > LOGPROB_TOLERANCE:
            return f"{where}logprobs differ by {max(apart):.3g} at token {apart.index(max(apart))}"
        if got.finish_reason != wanted.finish_reason:
            return f"{where}finish_reason {got.finish_reason} in place of {wanted.finish_reason}"
    for name in ("prompt_tokens", "completion_tokens"):
        if getattr(expected, name) != getattr(came, name):
            return f"usage: {getattr(came, name)} {name} in place of {getattr(expected, name)}"
    return ""


def _text_difference(wanted: str, got: str) -> str:
    at = next((n for n, (a, b) in enumerate(zip(wanted, got, strict=False)) if a != b), min(len(wanted), len(got)))
    kind = "other text"
    if wanted.startswith(got):
        kind = "missing tokens at the end"
    elif got.startswith(wanted):
        kind = "more tokens than there should be"
    elif len(got) > len(wanted) and got.endswith(wanted[at:]):
        kind = "repeated tokens"
    elif len(got) < len(wanted) and wanted.endswith(got[at:]):
        kind = "missing tokens"
    shown = slice(at, at + SHOWN_CHARACTERS)
    return f"{kind} from character {at}: {got[shown]!r} in place of {wanted[shown]!r}"


def _apart(a: Any, b: Any) -> float:
    """The greatest difference of two numbers at the same place; infinite if anything else differs."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return max((_apart(a[key], b[key]) for key in a), default=0.0)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return max((_apart(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b)
    return 0.0 if a == b else math.inf


class Load:
    """Streams that ask the questions over and over, each answer compared with the known one."""

    def __init__(self, client: Client, asked: Sequence[Question], timeout: float, seed: int) -> None:
        self.client = client
        self.questions = list(asked)
        self.timeout = timeout
        self.known: list[Answer] = []
        self.asked: list[Asked] = []
        self.reading: set[StreamReader] = set()
        """Those of the requests in flight."""
        self._draw = random.Random(seed)  # noqa: S311 - the order of the questions
        self._order: list[int] = []

    async def learn(self) -> None:
        """Ask every question once, one after the other, and keep the answers.

        Raises:
            TransferError: one of them is not answered; the text says which.

        """
        for number, question in enumerate(self.questions):
            asked, answer = await ask(self.client, question, number, self.timeout)
            if asked.failure:
                raise TransferError(f"{question.name}, undisturbed: {asked.failure}")
            self.known.append(answer)

    async def stream(self, streams: int, is_over: Callable[[], bool]) -> list[Asked]:
        """Keep `streams` requests in flight until `is_over`; those under way then may finish."""
        begun = len(self.asked)

        async def one() -> None:
            while not is_over():
                number = self._next()
                reader = StreamReader()
                self.reading.add(reader)
                try:
                    asked, answer = await ask(self.client, self.questions[number], number, self.timeout, reader)
                finally:
                    self.reading.discard(reader)
                if not asked.failure:
                    asked.wrong = difference(self.known[number], answer)
                self.asked.append(asked)
                if asked.failure:
                    await asyncio.sleep(PAUSE_AFTER_FAILURE_SECONDS)

        async with asyncio.TaskGroup() as group:
            for number in range(streams):
                group.create_task(one(), name=f"stream:{number}")
        return self.asked[begun:]

    def restart(self) -> None:
        """Let the next requests be every question once."""
        self._order.clear()

    def _next(self) -> int:
        if not self._order:
            self._order = list(range(len(self.questions)))
            self._draw.shuffle(self._order)
        return self._order.pop()
