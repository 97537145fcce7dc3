"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response

from services.gateway.completions import DEGRADED, check_room, usage
from services.gateway.context import Context, Envelope, parse
from services.gateway.generation import Piece
from services.gateway.openai_types import ChatRequest
from services.gateway.sse import answer, begin, while_connected
from services.router.messages import GenerateRequest
from shared.errors import MoeError


def routes(context: Context) -> APIRouter:
    """The endpoint, bound to its context."""
    router = APIRouter(tags=["openai"])

    def entry(token: int, logprob: float) -> dict[str, Any]:
        tokenizer = context.tokenizer
        return {"token": tokenizer.token_text(token), "logprob": logprob, "bytes": list(tokenizer.token_bytes(token))}

    def logprobs(body: ChatRequest, piece: Piece) -> list[dict[str, Any]]:
        if not body.logprobs:
            return []
        return [{**entry(p.token, p.logprob), "top_logprobs": [entry(*top) for top in p.top]} for p in piece.logprobs]

    async def whole(body: ChatRequest, requests: list[GenerateRequest], envelope: Envelope) -> dict[str, Any]:
        texts: list[list[str]] = [[] for _ in requests]
        scores: list[list[dict[str, Any]]] = [[] for _ in requests]
        reasons: list[str | None] = [None] * len(requests)
        tokens, degraded = 0, False
        async for index, piece in context.run(requests, body.stops):
            texts[index].append(piece.text)
            scores[index] += logprobs(body, piece)
            reasons[index] = piece.finish_reason
            tokens += len(piece.token_ids)
            degraded |= piece.degraded
        return {
            **envelope,
            "choices": [
                {
                    "index": i,
                    "message": {"role": "assistant", "content": "".join(texts[i]), "refusal": None},
                    "logprobs": {"content": scores[i], "refusal": None} if body.logprobs else None,
                    "finish_reason": reasons[i],
                }
                for i in range(len(requests))
            ],
            "usage": usage(len(requests[0].token_ids), tokens),
            **DEGRADED[degraded],
        }

    async def events(
        body: ChatRequest, requests: list[GenerateRequest], envelope: Envelope
    ) -> AsyncIterator[dict[str, Any]]:
        tokens = 0
        started: set[int] = set()
        pieces = context.run(requests, body.stops)
        try:
            async for index, piece in pieces:
                tokens += len(piece.token_ids)
                delta: dict[str, Any] = {}
                if index not in started:
                    started.add(index)
                    delta = {"role": "assistant", "content": ""}
                if piece.text:
                    delta["content"] = piece.text
                part = {
                    "index": index,
                    "delta": delta,
                    "logprobs": {"content": logprobs(body, piece), "refusal": None} if body.logprobs else None,
                    "finish_reason": piece.finish_reason,
                }
                yield {**envelope, "choices": [part], **DEGRADED[piece.degraded]}
        finally:
            await pieces.aclose()
        if body.include_usage:
            yield {**envelope, "choices": [], "usage": usage(len(requests[0].token_ids), tokens)}

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        body = await parse(request, ChatRequest)
        context.check_model(body.model)
        text = context.tokenizer.render_chat([message.as_template_input() for message in body.messages])
        ids = await context.encode(text, add_special_tokens=False)
        context.check_tokens(ids, "messages")
        room = context.max_model_len - len(ids)
        wanted = body.max_completion_tokens or body.max_tokens
        if body.max_tokens == 0:
            raise MoeError("invalid_request", "max_tokens: must be at least 1", param="max_tokens")
        check_room(context, [ids], wanted or 1)
        envelope = context.envelope("chatcmpl", "chat.completion.chunk" if body.stream else "chat.completion", body)
        requests = context.requests(
            body,
            envelope["id"],
            [ids],
            wanted or room,
            logprobs=(body.top_logprobs or 0) if body.logprobs else -1,
        )
        if body.stream:
            return await begin(request, events(body, requests, envelope))
        return answer(await while_connected(request, whole(body, requests, envelope)))

    return router
