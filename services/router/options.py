"""Which of the two forms of the dense part a router runs: our kernel's, or torch's."""

from __future__ import annotations

import structlog
import torch

from services.router.compiled_model import CompiledModel
from services.router.model import DenseModel
from shared.checkpoint import ModelConfig
from shared.errors import StartError
from shared.kernels.choice import Decision, compile_kernels
from shared.kernels.dense import MOST_HEAD_DIM, TILE
from shared.settings import RouterSettings

log = structlog.get_logger()


def choose_model(
    settings: RouterSettings, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> type[DenseModel]:
    """The form to load, which is logged with its reason.

    Raises:
        StartError: ENABLE_COMPILATION is true and cannot be.

    """
    decision = _choose(settings, config, dtype, device)
    log.info("router.compilation", compiled=decision.yes, reason=decision.reason)
    return CompiledModel if decision.yes else DenseModel


def _choose(settings: RouterSettings, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Decision:
    unfit = None
    if settings.kv_block_tokens % TILE:
        unfit = f"KV_BLOCK_TOKENS={settings.kv_block_tokens} is no multiple of {TILE}"
    elif config.head_dim > MOST_HEAD_DIM or config.head_dim % 2:
        unfit = f"a head of {config.head_dim} is not what our kernel is for: even, and at most {MOST_HEAD_DIM}"
    if unfit is None:
        # A CPU that multiplies bfloat16 itself is no reason against it: small steps are bound by calls and by memory.
        return compile_kernels(settings.enable_compilation, dtype, device, native=False)
    if settings.enable_compilation:
        raise StartError(f"ENABLE_COMPILATION=true: {unfit}")
    return Decision(False, unfit)
