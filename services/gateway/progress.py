"""What is known of one generation so far, and how another router goes on with it. A pure core.

Routers are lost; tokens are not: whatever the next one says begins where the last one stopped.
"""

from __future__ import annotations

import math

import msgspec

from services.router.messages import GenerateChunk, GenerateRequest
from shared.errors import BadMessageError, MoeError
from shared.wire import ITEMSIZE, Tensor

MOST_LOSSES = 5
"""So many routers may be lost without a new token between: a request that kills them must not go round for ever."""


class Progress:
    """A request, and what came of it."""

    def __init__(self, request: GenerateRequest) -> None:
        self._request = request
        self.tokens: list[int] = list(request.output_ids)
        self.tries = 0
        self.degraded = False
        self._losses = 0
        self._prompt_logprobs_told = False
        self._routing_told = 0
        """Rows, of all tries."""
        self._seen = 0
        """Tokens, of this try; those of `output_ids` too if it counts from them."""
        self._routing_seen = 0
        """Rows, of this try, without those held back."""
        self._routing_held: list[Tensor] = []

    def next_try(self) -> GenerateRequest:
        """What to ask the next router. Each try has an id of its own: only one of two that both run is listened to."""
        request = self._request
        name = f"{request.id}.{self.tries}" if self.tries else request.id
        self.tries += 1
        self._seen = self._routing_seen = 0
        self._routing_held = []
        return msgspec.structs.replace(
            request,
            id=name,
            output_ids=self.tokens.copy(),
            prompt_logprobs=-1 if self._prompt_logprobs_told else request.prompt_logprobs,
        )

    def take(self, chunk: GenerateChunk) -> GenerateChunk:
        """Note what `chunk` says; returns what is new in it.

        Raises:
            BadMessageError: it says more tokens than were asked for.
            MoeError: `chunk_lost`, if one before it is missing; `cancelled`, if the router has ended the generation by
                itself.

        """
        if chunk.finish_reason == "cancelled":  # whoever cancels by us does not read on
            raise MoeError("cancelled", "the router cancelled the generation")
        start = self._seen if chunk.start is None else chunk.start
        if start > len(self.tokens):
            raise MoeError("chunk_lost", f"{start - len(self.tokens)} tokens of the stream are missing")
        self._seen = start + len(chunk.token_ids)
        known = len(self.tokens) - start
        self.degraded |= chunk.degraded
        new = chunk.token_ids[known:]
        if len(self.tokens) + len(new) > self._request.max_tokens:
            raise BadMessageError(f"the router says more than max_tokens={self._request.max_tokens} tokens")
        routing = self._routing(chunk, start)
        if new:
            self.tokens += new
            self._losses = 0
        prompt_logprobs = None if self._prompt_logprobs_told else chunk.prompt_logprobs
        self._prompt_logprobs_told |= prompt_logprobs is not None
        changes = {
            "start": start + min(known, len(chunk.token_ids)),
            "token_ids": new,
            "logprobs": chunk.logprobs[known:],
            "prompt_logprobs": prompt_logprobs,
            "routing": routing,
            "degraded": self.degraded,
        }
        return msgspec.structs.replace(chunk, **changes)

    def _routing(self, chunk: GenerateChunk, start: int) -> Tensor | None:
        """Rows [n, L, k] that no earlier try has told.

        They are held back until a token, or the end, says how many there must be by now: a chunk without tokens has no
        number, so that its loss would not show.
        """
        if not self._request.return_routing:
            return None
        if chunk.routing is not None and chunk.routing.shape:
            self._routing_held.append(chunk.routing)
        if not chunk.token_ids and chunk.finish_reason is None:
            return None
        first, last = self._routing_seen, sum(part.shape[0] for part in self._routing_held) + self._routing_seen
        # The last token's own row is computed only for the token after it.
        expected = len(self._request.token_ids) + start + max(len(chunk.token_ids) - 1, 0)
        if last != expected:
            raise MoeError("chunk_lost", f"of {expected} rows of routing {last} have come")
        held, self._routing_held = self._routing_held, []
        known = max(self._routing_told - first, 0)
        self._routing_seen = last
        self._routing_told = max(self._routing_told, last)
        if known >= last - first:
            return None
        tail = held[0].shape[1:]
        row_bytes = math.prod(tail) * ITEMSIZE[held[0].dtype]
        data = b"".join(part.data for part in held)[known * row_bytes :]
        return Tensor(held[0].dtype, (last - first - known, *tail), memoryview(data))

    @property
    def complete(self) -> bool:
        """Whether every token is there, though no chunk has said that it was the last."""
        return 0 < self._request.max_tokens <= len(self.tokens)

    def lost(self) -> bool:
        """The router is lost. Whether another may be asked."""
        self._losses += 1
        return self._losses <= MOST_LOSSES
