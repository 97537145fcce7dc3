"""Names and shapes of the routed experts' tensors, per family and layout."""

from __future__ import annotations

from dataclasses import dataclass

from shared.checkpoint.config import ModelConfig
from shared.checkpoint.index import TensorIndex

PREFIX = "model.layers.{layer}."


@dataclass(frozen=True)
class ExpertNames:
    """One expert's tensors: gate and up [I, H] (or both as one [2I, H]), down [H, I].

    `row` is the expert's index where a layer's experts are stored as one stacked tensor [E, ...].
    """

    gate: str
    up: str
    down: str
    row: int | None = None


def moe_prefix(config: ModelConfig, index: TensorIndex, layer: int) -> str:
    """Where layer `layer`'s gate and experts are: Mixtral's hub layout has its own word."""
    old = f"{PREFIX.format(layer=layer)}block_sparse_moe."
    if config.family == "mixtral" and f"{old}gate.weight" in index.entries:
        return old
    return f"{PREFIX.format(layer=layer)}mlp."


def expert_names(config: ModelConfig, index: TensorIndex, layer: int, expert: int) -> ExpertNames:
    prefix = f"{moe_prefix(config, index, layer)}experts."
    if f"{prefix}gate_up_proj" in index.entries:
        return ExpertNames(f"{prefix}gate_up_proj", f"{prefix}gate_up_proj", f"{prefix}down_proj", expert)
    if f"{prefix}{expert}.w1.weight" in index.entries:
        gate, up, down = "w1", "w3", "w2"
    else:
        gate, up, down = "gate_proj", "up_proj", "down_proj"
    own = f"{prefix}{expert}."
    return ExpertNames(f"{own}{gate}.weight", f"{own}{up}.weight", f"{own}{down}.weight")


def check_experts(config: ModelConfig, index: TensorIndex) -> None:
    """Look every routed expert's tensors up, without reading them.

    Raises:
        CheckpointError: one is missing, or of another shape or type.

    """
    inner, hidden = config.moe_intermediate_size, config.hidden_size
    for layer in config.moe_layers:
        for expert in range(config.num_experts):
            names = expert_names(config, index, layer, expert)
            if names.row is None:
                index.expect(names.gate, (inner, hidden))
                index.expect(names.up, (inner, hidden))
                index.expect(names.down, (hidden, inner))
            elif not expert:
                index.expect(names.gate, (config.num_experts, 2 * inner, hidden))
                index.expect(names.down, (config.num_experts, hidden, inner))
