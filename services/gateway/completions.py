"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request, Response

from services.gateway.context import Context, Envelope, parse
from services.gateway.generation import Piece
from services.gateway.openai_types import CompletionRequest
from services.gateway.sse import answer, begin, while_connected
from services.router.messages import GenerateRequest, TokenLogprob
from shared.errors import MoeError

DEFAULT_MAX_TOKENS = 16
DEGRADED: dict[bool, dict[str, Any]] = {False: {}, True: {"degraded": True}}
"""What an answer says of itself if some of its tokens were computed without some of their experts."""


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def _prompts(context: Context, prompt: Any) -> list[list[int]]:
    """Token ids of each prompt: of a text, a list of texts, token ids, or a list of lists of them."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        prompts = [prompt]
    elif isinstance(prompt, list):
        prompts = [p if isinstance(p, list) else await context.encode(p) for p in prompt]
    else:
        prompts = [await context.encode(prompt)]
    if not prompts:
        raise MoeError("invalid_request", "the prompt is empty", param="prompt")
    for ids in prompts:
        context.check_tokens(ids)
    return prompts


def check_room(context: Context, prompts: list[list[int]], max_tokens: int) -> None:
    longest = max(len(ids) for ids in prompts)
    if longest + max_tokens > context.max_model_len:
        raise MoeError(
            "context_length_exceeded",
            f"{longest} prompt tokens and max_tokens={max_tokens} exceed the {context.max_model_len} tokens "
            "that this model can hold",
            param="max_tokens",
        )


@dataclass
class LogprobsBuilder:
    """The legacy logprobs object, grown token by token."""

    context: Context
    offset: int = 0
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add(self, token: int, value: TokenLogprob | None) -> None:
        text = self.context.tokenizer.token_text(token)
        self.tokens.append(text)
        self.text_offset.append(self.offset)
        self.offset += len(text)
        if value is None:
            self.token_logprobs.append(None)
            self.top_logprobs.append(None)
            return
        self.token_logprobs.append(value.logprob)
        top = {self.context.tokenizer.token_text(t): score for t, score in value.top}
        top.setdefault(text, value.logprob)
        self.top_logprobs.append(top)

    def take(self) -> dict[str, Any]:
        """What was added since the last call."""
        result = {
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        }
        self.tokens, self.token_logprobs, self.top_logprobs, self.text_offset = [], [], [], []
        return result


@dataclass
class Choice:
    """One choice of the answer, as it grows."""

    request: GenerateRequest
    index: int
    logprobs: LogprobsBuilder | None
    echo: str | None
    text: list[str] = field(default_factory=list)
    completion_tokens: int = 0
    finish_reason: str | None = None
    degraded: bool = False

    def take(self, piece: Piece) -> str:
        """Add `piece`; returns the text that it adds, the echoed prompt before the first."""
        text = piece.text
        if self.logprobs is not None:
            if self.echo is not None and piece.prompt_logprobs is not None:
                for token, value in zip(self.request.token_ids, piece.prompt_logprobs, strict=True):
                    self.logprobs.add(token, value)
            for token, value in zip(piece.token_ids, piece.logprobs, strict=True):
                self.logprobs.add(token, value)
        if self.echo is not None:
            text, self.echo = self.echo + text, None
        self.text.append(text)
        self.completion_tokens += len(piece.token_ids)
        self.finish_reason = piece.finish_reason
        self.degraded |= piece.degraded
        return text


def _choices(context: Context, body: CompletionRequest, requests: list[GenerateRequest]) -> list[Choice]:
    return [
        Choice(
            request,
            index,
            LogprobsBuilder(context) if body.logprobs is not None else None,
            context.tokenizer.decode(request.token_ids, skip_special_tokens=False) if body.echo else None,
        )
        for index, request in enumerate(requests)
    ]


def routes(context: Context) -> APIRouter:
    """The endpoint, bound to its context."""
    router = APIRouter(tags=["openai"])

    async def whole(
        body: CompletionRequest, requests: list[GenerateRequest], prompt_tokens: int, envelope: Envelope
    ) -> dict[str, Any]:
        choices = _choices(context, body, requests)
        async for index, piece in context.run(requests, body.stops):
            choices[index].take(piece)
        return {
            **envelope,
            "choices": [
                {
                    "index": c.index,
                    "text": "".join(c.text),
                    "logprobs": c.logprobs.take() if c.logprobs else None,
                    "finish_reason": c.finish_reason,
                }
                for c in choices
            ],
            "usage": usage(prompt_tokens, sum(c.completion_tokens for c in choices)),
            **DEGRADED[any(c.degraded for c in choices)],
        }

    async def events(
        body: CompletionRequest, requests: list[GenerateRequest], prompt_tokens: int, envelope: Envelope
    ) -> AsyncIterator[dict[str, Any]]:
        choices = _choices(context, body, requests)
        pieces = context.run(requests, body.stops)
        try:
            async for index, piece in pieces:
                choice = choices[index]
                text = choice.take(piece)
                if text or piece.token_ids or piece.finish_reason:
                    part = {
                        "index": index,
                        "text": text,
                        "logprobs": choice.logprobs.take() if choice.logprobs else None,
                        "finish_reason": piece.finish_reason,
                    }
                    yield {**envelope, "choices": [part], **DEGRADED[piece.degraded]}
        finally:
            await pieces.aclose()
        if body.include_usage:
            total = sum(c.completion_tokens for c in choices)
            yield {**envelope, "choices": [], "usage": usage(prompt_tokens, total)}

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        """Complete a prompt: text, list of texts, token ids, or list of lists of token ids."""
        body = await parse(request, CompletionRequest)
        context.check_model(body.model)
        prompts = await _prompts(context, body.prompt)
        max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        if max_tokens == 0 and not body.echo:
            raise MoeError("invalid_request", "max_tokens: 0 is only allowed with echo", param="max_tokens")
        check_room(context, prompts, max_tokens)
        logprobs = -1 if body.logprobs is None else body.logprobs
        envelope = context.envelope("cmpl", "text_completion", body)
        requests = context.requests(
            body,
            envelope["id"],
            prompts,
            max_tokens,
            logprobs=logprobs,
            prompt_logprobs=logprobs if body.echo else -1,
        )
        prompt_tokens = sum(len(ids) for ids in prompts)
        if body.stream:
            return await begin(request, events(body, requests, prompt_tokens, envelope))
        return answer(await while_connected(request, whole(body, requests, prompt_tokens, envelope)))

    return router
