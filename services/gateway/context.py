"""What every endpoint needs: the model's facts, the bus, the fleet, the generator."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from services.gateway.admission import Admission
from services.gateway.answers import Answers
from services.gateway.forwards import Forwards
from services.gateway.generation import Generator, Observations, Piece
from services.gateway.idempotency import Idempotency
from services.gateway.openai_types import GenerationParameters
from services.gateway.report import REPORT_SECONDS
from services.gateway.text import TextTokenizer
from services.monitor.observations import History
from services.router.messages import GenerateRequest, Sampling
from shared.bus import Bus
from shared.checkpoint import ModelConfig
from shared.errors import MoeError
from shared.settings import GatewaySettings
from shared.status import Fleet, Status

B = TypeVar("B", bound=BaseModel)
Envelope = dict[str, Any]
MERGE_QUEUE_PIECES = 64
REPORTS_SPACING_SECONDS = 5.0
"""Of the reports that are kept: a large model's counts per expert take room."""


@dataclass
class Context:
    """One gateway's parts."""

    settings: GatewaySettings
    config: ModelConfig
    deployment: str
    instance: str
    bus: Bus
    fleet: Fleet
    tokenizer: TextTokenizer
    admission: Admission
    observations: Observations
    answers: Answers
    generator: Generator
    forwards: Forwards
    idempotency: Idempotency
    started: float = field(default_factory=time.time)
    history: History = field(default_factory=lambda: History(REPORT_SECONDS, spacing=REPORTS_SPACING_SECONDS))
    """Everybody's reports of the last minute."""
    draining: bool = False
    open_connections: int = 0

    @property
    def open_requests(self) -> int:
        """Requests with a connection, and those that are computed whether or not they still have one."""
        return self.open_connections + self.idempotency.running

    @property
    def model_name(self) -> str:
        return self.settings.model_name

    @property
    def max_model_len(self) -> int:
        """The longest sequence that every ready router can hold."""
        limits = [s.max_model_len for s in self.routers() if s.max_model_len]
        own = self.settings.max_model_len or self.config.context_length
        return min([*limits, own, self.config.context_length])

    def routers(self) -> list[Status]:
        """Reports of the deployment's live routers."""
        return [s for s in self.fleet.live("router") if s.deployment == self.deployment]

    def check_model(self, name: str | None) -> None:
        """Refuse any model but the one that is served.

        Raises:
            MoeError: `model_not_found`.

        """
        if name is not None and name != self.model_name:
            message = f"the model {name!r} does not exist here; this server has {self.model_name!r}"
            raise MoeError("model_not_found", message, param="model")

    def check_tokens(self, ids: list[int], param: str = "prompt") -> None:
        """Refuse prompts that cannot be computed.

        Raises:
            MoeError: empty, out of vocabulary, or longer than the model can hold.

        """
        if not ids:
            raise MoeError("invalid_request", "the prompt is empty", param=param)
        if max(ids) >= self.config.vocab_size:
            message = f"token id {max(ids)} is out of the vocabulary of {self.config.vocab_size}"
            raise MoeError("invalid_request", message, param=param)
        if len(ids) > self.max_model_len:
            message = f"the prompt has {len(ids)} tokens, the model can hold {self.max_model_len}"
            raise MoeError("context_length_exceeded", message, param=param)

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; long texts are tokenized beside the event loop.

        Raises:
            MoeError: `invalid_request`, for text that is not valid Unicode.

        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise MoeError("invalid_request", "the prompt is not valid Unicode", param="prompt") from None
        if len(text) < 2048:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)

    def envelope(self, prefix: str, kind: str, body: GenerationParameters) -> Envelope:
        """What every answer of OpenAI's shape begins with; the id is ours, as clients may repeat theirs."""
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.model_name,
            # The same seed gives the same text as long as this stays the same.
            "system_fingerprint": self.deployment,
            **({"usage": None} if body.include_usage else {}),
        }

    def sampling(self, body: GenerationParameters, seed: int) -> Sampling:
        bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
        if any(token >= self.config.vocab_size for token in bias):
            raise MoeError("invalid_request", "logit_bias: a token id is out of the vocabulary", param="logit_bias")
        return Sampling(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=max(body.top_k or 0, 0),
            min_p=body.min_p or 0.0,
            seed=seed,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
            logit_bias=bias,
        )

    def requests(
        self,
        body: GenerationParameters,
        name: str,
        prompts: list[list[int]],
        max_tokens: int,
        *,
        logprobs: int = -1,
        prompt_logprobs: int = -1,
    ) -> list[GenerateRequest]:
        """One request per prompt and choice; choice c of a seeded request uses seed + c."""
        self.admission.check(len(prompts) * (body.n or 1))
        first = secrets.randbits(62) if body.seed is None else body.seed
        requests = []
        for number, ids in enumerate(prompts):
            for choice in range(body.n or 1):
                requests.append(  # noqa: PERF401 - two nested loops read better so
                    GenerateRequest(
                        id=f"{name}-{number}-{choice}",
                        token_ids=ids,
                        max_tokens=max_tokens,
                        sampling=self.sampling(body, (first + choice) % 2**63),
                        stop_token_ids=body.stop_token_ids or [],
                        ignore_eos=body.ignore_eos,
                        logprobs=logprobs,
                        prompt_logprobs=prompt_logprobs,
                        client=self.instance,
                    )
                )
        return requests

    async def run(self, requests: list[GenerateRequest], stops: list[str]) -> AsyncGenerator[tuple[int, Piece], None]:
        """All generations of one HTTP request, merged as they come; leaving early cancels them.

        Raises:
            MoeError: `overloaded`, before any of them begins; else the first that any of them meets.

        """
        # All in one step: who has a turn in line is counted by those who come after.
        places = self.admission.join(len(requests))
        merged: asyncio.Queue[tuple[int, Piece] | Exception | None] = asyncio.Queue(MERGE_QUEUE_PIECES)

        async def read(index: int) -> None:
            try:
                async with contextlib.aclosing(
                    self.generator.generate(requests[index], stops, places[index])
                ) as pieces:
                    async for piece in pieces:
                        await merged.put((index, piece))
                await merged.put(None)
            except Exception as error:  # carried over to the reader, which raises it
                await merged.put(error)

        tasks = [asyncio.create_task(read(i), name=f"read:{r.id}") for i, r in enumerate(requests)]
        try:
            left = len(tasks)
            while left:
                item = await merged.get()
                if item is None:
                    left -= 1
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for place in places:  # a task that was cancelled before it began has not
                place.leave()


async def parse(request: Request, kind: type[B]) -> B:
    """The JSON body as a `kind`.

    Raises:
        MoeError: `invalid_request`, naming the parameter and what is wrong with it.

    """
    return parse_json(await request.body(), kind)


def parse_json(body: bytes, kind: type[B]) -> B:
    """`body` as a `kind`.

    Raises:
        MoeError: `invalid_request`, naming the parameter and what is wrong with it.

    """
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise MoeError("invalid_request", f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise MoeError("invalid_request", "the body must be a JSON object")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        text = problem["msg"].removeprefix("Value error, ")
        param = str(problem["loc"][0]) if problem["loc"] else text.split(":")[0]
        where = ".".join(str(part) for part in problem["loc"] if not str(part).startswith(("list[", "function-")))
        raise MoeError("invalid_request", f"{where}: {text}" if where else text, param=param) from None
