"""One step through the model: the dense part here, the routed experts behind the seam."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import torch

from services.router.batch import Batch
from services.router.experts import Experts
from services.router.kv_cache import KVCache
from services.router.model import DenseModel, Routing
from shared.compute import Compute


@dataclass(frozen=True)
class StepResult:
    logits: torch.Tensor
    """[R, V] float32, for the batch's `logits_rows`."""
    routing: torch.Tensor | None
    """[T, L, k]: experts of each row in each MoE layer, if asked for."""


async def moe_layer(
    model: DenseModel, experts: Experts, compute: Compute, layer: int, routing: Routing
) -> torch.Tensor:
    """Routed experts plus shared expert [T, H]; the shared one computes while the routed ones are away."""
    if not model.config.shared_expert_intermediate_size:
        return await experts(layer, routing.hidden, routing.top_k_index, routing.top_k_weights)
    shared = asyncio.ensure_future(compute(model.shared_expert, layer, routing.hidden))
    try:
        routed = await experts(layer, routing.hidden, routing.top_k_index, routing.top_k_weights)
    finally:
        own = await shared
    return routed if own is None else await compute(torch.add, routed, own)


async def forward(
    model: DenseModel, experts: Experts, compute: Compute, cache: KVCache, batch: Batch, *, want_routing: bool = False
) -> StepResult:
    """All of the batch's tokens through all layers, together.

    Raises:
        MoeError: when experts cannot be reached; the cache then holds garbage for the step's own slots only.

    """
    hidden, cos, sin = await compute(model.embed, batch)  # [T, H]
    added: torch.Tensor | None = None
    taken: list[torch.Tensor] = []
    moe_layers = frozenset(model.config.moe_layers)

    def before_experts(layer: int, hidden: torch.Tensor, added: torch.Tensor | None) -> tuple[torch.Tensor, Routing]:
        hidden = hidden if added is None else hidden + added
        hidden = model.attention(layer, hidden, cos, sin, batch, cache)
        return hidden, model.route(layer, hidden)

    def dense_layer(layer: int, hidden: torch.Tensor, added: torch.Tensor | None) -> torch.Tensor:
        hidden = hidden if added is None else hidden + added
        return model.dense_mlp(layer, model.attention(layer, hidden, cos, sin, batch, cache))

    def logits(hidden: torch.Tensor, added: torch.Tensor | None) -> torch.Tensor:
        return model.logits(hidden if added is None else hidden + added, batch.logits_rows)

    for layer in range(model.config.num_hidden_layers):
        if layer in moe_layers:
            hidden, routing = await compute(before_experts, layer, hidden, added)
            if want_routing:
                taken.append(routing.top_k_index)
            added = await moe_layer(model, experts, compute, layer, routing)
        else:
            hidden, added = await compute(dense_layer, layer, hidden, added), None
    result = await compute(logits, hidden, added)
    return StepResult(result, torch.stack(taken, dim=1) if want_routing else None)
