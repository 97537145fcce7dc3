"""The messages that a router takes, and its answers. docs/protocol.md specifies them."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from shared import wire
from shared.errors import BadMessageError
from shared.wire import Message, Tensor

Seed = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
FinishReason = Literal["stop", "length", "cancelled"]


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is chosen. Neutral values are the defaults; temperature 0 is greedy."""

    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] = 1.0
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, msgspec.Meta(ge=0)] = 0
    """0: all tokens."""
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    seed: Seed = 0
    presence_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0, le=100)] = 1.0
    logit_bias: dict[int, Annotated[float, msgspec.Meta(ge=-100, le=100)]] = {}


class GenerateRequest(Message, frozen=True, kw_only=True, omit_defaults=True):
    """`moe.<d>.generate`: continue `token_ids` by up to `max_tokens` tokens. One request is one sequence."""

    id: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    token_ids: Annotated[list[Annotated[int, msgspec.Meta(ge=0)]], msgspec.Meta(min_length=1)]
    max_tokens: Annotated[int, msgspec.Meta(ge=0)]
    """New tokens at most, those of `output_ids` among them."""
    output_ids: list[Annotated[int, msgspec.Meta(ge=0)]] = []
    """New tokens that are known already, from a router that was lost: the generation goes on after them, as it would
    have there (seed, penalties, stop tokens)."""
    sampling: Sampling = Sampling()
    stop_token_ids: list[int] = []
    """Generation ends after one of these; the token is reported but is not part of the text."""
    ignore_eos: bool = False
    logprobs: Annotated[int, msgspec.Meta(ge=-1, le=20)] = -1
    """Log-probabilities of the chosen token and of this many most likely ones; -1: none."""
    prompt_logprobs: Annotated[int, msgspec.Meta(ge=-1, le=20)] = -1
    """The same for the prompt's tokens."""
    return_logits: bool = False
    """Raw float32 logits [V] with each token; for checks against another implementation."""
    return_prompt_logits: bool = False
    return_routing: bool = False
    """Which experts each token took."""
    client: str = ""
    """The instance that asks, if it publishes status reports: its silence cancels the request."""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """One token's log-probability under the model, before penalties and temperature, and the likeliest others."""

    token: int
    logprob: float
    rank: int
    """1 for the most likely token."""
    top: list[tuple[int, float]] = []


class GenerateChunk(Message, frozen=True, kw_only=True, omit_defaults=True):
    """One of the replies to a GenerateRequest.

    The first, empty one says who took it; the one with `finish_reason` is the last.
    """

    id: str
    instance: str = ""
    token_ids: list[int] = []
    start: int | None = None
    """New tokens before this chunk's, those of the request's `output_ids` among them: a gap shows that one was lost.
    None: as many as this stream has told so far."""
    logprobs: list[TokenLogprob] = []
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """One per prompt token; None for the first, which nothing precedes. Comes before the first new token."""
    logits: Tensor | None = None
    """[n, V] float32, one row per token of `token_ids`."""
    prompt_logits: Tensor | None = None
    """[n, V] float32, the rows that follow those already sent."""
    routing: Tensor | None = None
    """[n, L, k] int32, for the positions that follow those already sent; L counts the MoE layers."""
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The token that ended it, if one did; it is the last of `token_ids`."""
    degraded: bool = False
    """Some token so far was computed without some of its experts (DEGRADED_MODE=skip)."""


class ForwardRequest(Message, frozen=True, kw_only=True):
    """`moe.<d>.forward`: hidden states through one MoE layer (its gate, routed experts and shared expert)."""

    layer: Annotated[int, msgspec.Meta(ge=0)]
    hidden_states: Tensor
    """[T, H], any float dtype."""


class ForwardReply(Message, frozen=True, kw_only=True):
    hidden_states: Tensor
    """[T, H] float32."""
    top_k_index: Tensor
    """[T, k] int64."""
    top_k_weights: Tensor
    """[T, k] float32."""
    degraded: bool = False
    """Some experts were left out (DEGRADED_MODE=skip)."""


class CancelRequest(Message, frozen=True, kw_only=True):
    """`moe.control.router.<instance>`: stop generation `id`; its blocks are free within one step."""

    op: Literal["cancel"] = "cancel"
    id: str


class CancelReply(Message, frozen=True, kw_only=True):
    found: bool


class CheckRequest(Message, frozen=True, kw_only=True):
    """`moe.control.router.<instance>`: which of the generations `ids` the router has."""

    op: Literal["check"] = "check"
    ids: Annotated[list[str], msgspec.Meta(max_length=65536)]


class CheckReply(Message, frozen=True, kw_only=True):
    tokens: dict[str, int]
    """By the id of each that it has: how many new tokens it has told of."""


def decode_control(data: bytes) -> CancelRequest | CheckRequest:
    """The message to `moe.control.router.<instance>` in `data`.

    Raises:
        BadMessageError: it is none.

    """
    try:
        return wire.decode(CheckRequest, data)
    except BadMessageError:
        return wire.decode(CancelRequest, data)
