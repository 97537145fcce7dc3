"""What a worker makes of its experts: compiled or not, widened or not, quantized, pruned."""

from __future__ import annotations

from typing import Literal

import structlog
import torch

from shared.checkpoint import ModelConfig
from shared.experts import ExpertOptions
from shared.kernels.choice import Decision, compile_kernels, dtype_name
from shared.linear import has_native_bfloat16
from shared.memory import available_memory
from shared.pruning import kept_channels
from shared.settings import ExpertSettings

log = structlog.get_logger()

SHARE_OF_MEMORY = 0.5


def choose_options(
    settings: ExpertSettings, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> ExpertOptions:
    """How this worker keeps and computes its experts; logs what it decides.

    Raises:
        StartError: ENABLE_COMPILATION is true and cannot be.

    """
    int8 = settings.quantization == "8bit"
    weights = torch.int8 if int8 else dtype
    compilation = compile_kernels(settings.enable_compilation, weights, device, native=has_native_bfloat16())
    widening = choose_widening(
        settings.widen_weights,
        weights=weights,
        device=device,
        compiled=compilation.yes,
        native=has_native_bfloat16(),
        needed=widened_bytes(config, workers=settings.workers, shards=settings.expert_shards),
        available=available_memory(),
    )
    log.info("expert.compilation", compiled=compilation.yes, reason=compilation.reason)
    log.info("expert.widening", widen=widening.yes, reason=widening.reason)
    if settings.sparsity_ratio:
        inner = config.moe_intermediate_size
        log.info("expert.sparsity", kept_channels=kept_channels(inner, settings.sparsity_ratio), channels=inner)
    return ExpertOptions(
        widen=widening.yes,
        quantization=settings.quantization,
        sparsity=settings.sparsity_ratio,
        compiled=compilation.yes,
    )


def widened_bytes(config: ModelConfig, *, workers: int, shards: int) -> int:
    """Bytes of all experts as float32, as often as `workers` hold each of `shards` shards."""
    replicas = -(-workers // shards)
    per_expert = 3 * config.moe_intermediate_size * config.hidden_size * torch.float32.itemsize
    return per_expert * config.num_experts * len(config.moe_layers) * replicas


def choose_widening(
    setting: Literal["auto", "on", "off"],
    *,
    weights: torch.dtype,
    device: torch.device,
    compiled: bool,
    native: bool,
    needed: int,
    available: int,
) -> Decision:
    """Decide, for the setting WIDEN_WEIGHTS.

    All experts count and not this worker's alone: the workers of one machine start together, and each sees the memory
    that the others have not taken yet.

    Args:
        setting: as the user chose.
        weights: what the experts' weights are otherwise kept in.
        device: where they are computed.
        compiled: the compiled kernel computes them, which widens in registers.
        native: this CPU multiplies bfloat16 itself.
        needed: bytes of all experts when widened.
        available: bytes that may still be taken.

    """
    if weights is not torch.bfloat16 or device.type != "cpu":
        return Decision(False, f"nothing to widen: {dtype_name(weights)} on {device.type}")
    if compiled:
        return Decision(False, "the compiled kernel widens as it reads")
    if setting != "auto":
        return Decision(setting == "on", f"WIDEN_WEIGHTS={setting}")
    if native:
        return Decision(False, "this CPU multiplies bfloat16 itself")
    sizes = f"{needed / 1e9:.2f} GB of all experts in float32, {available / 1e9:.2f} GB of memory available"
    if needed > SHARE_OF_MEMORY * available:
        return Decision(False, f"more than half of the memory: {sizes}")
    return Decision(True, f"this CPU has no bfloat16 instructions, and memory is ample: {sizes}")
