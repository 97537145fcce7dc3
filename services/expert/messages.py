"""The messages that an expert worker takes, and its answer. docs/protocol.md specifies them."""

from __future__ import annotations

from typing import Annotated

import msgspec

from shared.wire import Message, Tensor


class ExpertsRequest(Message, frozen=True, kw_only=True):
    """`moe.<d>.experts.<shard>`: T hidden states and P (token, expert, weight) pairs among the shard's experts."""

    layer: Annotated[int, msgspec.Meta(ge=0)]
    hidden_states: Tensor
    """[T, H] in the model's dtype."""
    token_index: Tensor
    """[P] int32: row of `hidden_states`."""
    expert_index: Tensor
    """[P] int32: the expert's number in the model."""
    weights: Tensor
    """[P] float32."""


class ExpertsReply(Message, frozen=True, kw_only=True):
    hidden_states: Tensor
    """[T, H]: the weighted sum over each token's pairs, in the request's dtype."""
