"""One generation: its tokens, its blocks, how far its KV cache reaches."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from services.router.messages import FinishReason, GenerateRequest, TokenLogprob


@dataclass(eq=False)
class Sequence:
    """A request's state in the engine. `computed` tokens have their keys and values in `blocks`."""

    request: GenerateRequest
    arrival: float
    deadline: float | None = None
    """For the first token; None: whenever."""
    eos_token_ids: frozenset[int] = frozenset()
    output: list[int] = field(init=False)
    """New tokens, from the request's `output_ids` on."""
    counts: Counter[int] = field(init=False)
    """Occurrences of each token in `output`."""
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    passed_over: int = 0
    """How often a later arrival was admitted before this one."""
    cancelled: bool = False
    admitted: float | None = None
    first_token: float | None = None
    last_sign: float | None = None
    """When an empty chunk last said that the prefill goes on."""
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    prompt_rows_sent: int = 0
    routing_rows_sent: int = 0
    request_id: str = ""
    degraded: bool = False
    """Whether some token so far was computed without some of its experts."""

    def __post_init__(self) -> None:
        self.output = list(self.request.output_ids)
        self.counts = Counter(self.output)

    @property
    def prompt_length(self) -> int:
        return len(self.request.token_ids)

    @property
    def length(self) -> int:
        return len(self.request.token_ids) + len(self.output)

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are still to be computed."""
        return self.length - self.computed

    @property
    def wants_prompt_rows(self) -> bool:
        return self.request.prompt_logprobs >= 0 or self.request.return_prompt_logits

    def tokens(self, start: int, end: int) -> list[int]:
        prompt = self.request.token_ids
        if start >= len(prompt):
            return self.output[start - len(prompt) : end - len(prompt)]
        return (
            (prompt[start:end] + self.output[: max(0, end - len(prompt))]) if end > len(prompt) else prompt[start:end]
        )

    def append(self, token: int) -> tuple[FinishReason | None, int | None]:
        """Add a chosen token; returns why it ends the generation, if it does, and the token that ended it."""
        self.output.append(token)
        self.counts[token] += 1
        if token in self.request.stop_token_ids or (token in self.eos_token_ids and not self.request.ignore_eos):
            return "stop", token
        if len(self.output) >= self.request.max_tokens:
            return "length", None
        return None, None
