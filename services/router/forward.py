"""One step through the model: the dense part here, the routed experts behind the seam."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import torch

from services.router.batch import Batch
from services.router.experts import Experts, Question
from services.router.model import DenseModel, Routing
from shared.compute import Compute


@dataclass(frozen=True)
class StepResult:
    logits: torch.Tensor
    """[R, V] float32, for the batch's `logits_rows`."""
    routing: torch.Tensor | None
    """[T, L, k]: experts of each row in each MoE layer, if asked for."""
    degraded: torch.Tensor | None = None
    """[T] bool: rows that lacked some of their experts in some layer; None if none did."""


@dataclass(frozen=True)
class MoeLayer:
    """A MoE layer that waits for its experts' answers, or has them."""

    routing: Routing
    question: Question
    shared: torch.Tensor | None
    """[T, H]: the shared expert's part, computed while the routed ones are away."""

    def result(self) -> torch.Tensor:
        """Routed experts plus shared expert [T, H], float32."""
        routed = self.question.result()
        return routed if self.shared is None else routed + self.shared


async def ask(model: DenseModel, compute: Compute, layer: int, routing: Routing, question: Question) -> MoeLayer:
    """Ask the routed experts; the shared one computes meanwhile."""
    if not model.config.shared_expert_intermediate_size:
        await question.ask()
        return MoeLayer(routing, question, None)
    asking = asyncio.ensure_future(question.ask())
    await asyncio.sleep(0)  # the question leaves before this process computes
    try:
        shared = await compute(model.shared_expert, layer, routing.hidden, rows=routing.hidden.shape[0])
    finally:
        await asking
    return MoeLayer(routing, question, shared)


async def moe_layer(
    model: DenseModel, experts: Experts, compute: Compute, layer: int, routing: Routing
) -> tuple[torch.Tensor, bool]:
    """One MoE layer by itself: routed experts plus shared expert [T, H], and whether some experts were left out."""
    rows = routing.hidden.shape[0]
    question = await compute(
        experts.question, layer, routing.hidden, routing.top_k_index, routing.top_k_weights, rows=rows
    )
    answered = await ask(model, compute, layer, routing, question)
    out = await compute(answered.result, rows=rows)
    return out.to(routing.hidden.dtype), question.degraded is not None


async def forward(
    model: DenseModel, experts: Experts, compute: Compute, batch: Batch, *, want_routing: bool = False
) -> StepResult:
    """All of the batch's tokens through all layers, together.

    All that lies between one layer's answers and the next layer's question is one call of `compute`.

    Raises:
        MoeError: when experts cannot be reached; the cache then holds garbage for the step's own slots only.

    """
    rows = batch.size
    step = await compute(model.begin, batch, rows=rows)
    hidden = step.hidden  # [T, H]
    before: MoeLayer | None = None
    taken: list[torch.Tensor] = []
    degraded: torch.Tensor | None = None
    moe_layers = frozenset(model.config.moe_layers)

    def complete(hidden: torch.Tensor, before: MoeLayer | None) -> torch.Tensor:
        return hidden if before is None else hidden + before.result().to(hidden.dtype)

    def to_experts(layer: int, hidden: torch.Tensor, before: MoeLayer | None) -> tuple[torch.Tensor, Routing, Question]:
        hidden = step.attention(layer, complete(hidden, before))
        routing = model.route(layer, hidden)
        return hidden, routing, experts.question(layer, routing.hidden, routing.top_k_index, routing.top_k_weights)

    def dense_layer(layer: int, hidden: torch.Tensor, before: MoeLayer | None) -> torch.Tensor:
        return model.dense_mlp(layer, step.attention(layer, complete(hidden, before)))

    def logits(hidden: torch.Tensor, before: MoeLayer | None) -> torch.Tensor:
        return model.logits(complete(hidden, before), batch.logits_rows)

    for layer in range(model.config.num_hidden_layers):
        if layer in moe_layers:
            hidden, routing, question = await compute(to_experts, layer, hidden, before, rows=rows)
            if want_routing:
                taken.append(routing.top_k_index)
            before = await ask(model, compute, layer, routing, question)
            if question.degraded is not None:
                degraded = question.degraded if degraded is None else degraded | question.degraded
        else:
            hidden, before = await compute(dense_layer, layer, hidden, before, rows=rows), None
    result = await compute(logits, hidden, before, rows=rows)
    return StepResult(result, torch.stack(taken, dim=1) if want_routing else None, degraded)
