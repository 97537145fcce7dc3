"""What a worker makes of its experts: compiled or not, widened or not, quantized, pruned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import structlog
import torch

from shared.checkpoint import ModelConfig
from shared.errors import StartError
from shared.experts import ExpertOptions
from shared.kernels.build import find_compiler, load_kernels
from shared.kernels.experts import DTYPES
from shared.linear import has_native_bfloat16
from shared.memory import available_memory
from shared.pruning import kept_channels
from shared.settings import ExpertSettings

log = structlog.get_logger()

SHARE_OF_MEMORY = 0.5


@dataclass(frozen=True)
class Decision:
    """Yes or no, and why, for the log."""

    yes: bool
    reason: str


def choose_options(
    settings: ExpertSettings, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> ExpertOptions:
    """How this worker keeps and computes its experts; logs what it decides.

    Raises:
        StartError: ENABLE_COMPILATION is true and cannot be.

    """
    int8 = settings.quantization == "8bit"
    weights = torch.int8 if int8 else dtype
    compilation = choose_compilation(
        settings.enable_compilation,
        weights=weights,
        device=device,
        native=has_native_bfloat16(),
        avx512=bool(torch.cpu.get_capabilities().get("avx512_f")),
        compiler=find_compiler(),
    )
    if compilation.yes:
        try:
            load_kernels()
        except StartError as error:
            if settings.enable_compilation:
                raise
            compilation = Decision(False, str(error))
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


def choose_compilation(
    setting: bool | None,
    *,
    weights: torch.dtype,
    device: torch.device,
    native: bool,
    avx512: bool,
    compiler: str | None,
) -> Decision:
    """Decide, for the setting ENABLE_COMPILATION.

    Args:
        setting: as the user chose; None: where it pays.
        weights: what the experts' weights are kept in.
        device: where they are computed.
        native: this CPU multiplies bfloat16 itself.
        avx512: this CPU has AVX-512, which the kernel is written for; elsewhere it is right and slow.
        compiler: the C++ compiler, if there is one.

    Raises:
        StartError: it is asked for, and these weights have no compiled kernel.

    """
    if setting is False:
        return Decision(False, "ENABLE_COMPILATION=false")
    if device.type != "cpu" or weights not in DTYPES:
        reason = f"the compiled kernel is not for {_name(weights)} on {device.type}"
        if setting:
            raise StartError(f"ENABLE_COMPILATION=true: {reason}; use DTYPE=bfloat16 or float32, or QUANTIZATION=8bit")
        return Decision(False, reason)
    if setting:
        return Decision(True, "ENABLE_COMPILATION=true")
    if weights is torch.bfloat16 and native:
        return Decision(False, "this CPU multiplies bfloat16 itself")
    if not avx512:
        return Decision(False, "the compiled kernel is slow without AVX-512")
    if compiler is None:
        return Decision(False, "no C++ compiler (g++ or clang++) is installed")
    return Decision(True, f"{compiler} is there")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
        return Decision(False, f"nothing to widen: {_name(weights)} on {device.type}")
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
