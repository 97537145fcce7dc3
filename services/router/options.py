"""Which of the two forms of the dense part a router runs: our kernel's, or torch's."""

from __future__ import annotations

import structlog
import torch

from services.router.compiled_model import CompiledModel
from services.router.model import DenseModel
from shared.checkpoint import ModelConfig
from shared.kernels.choice import Decision, compile_kernels, dtype_name
from shared.kernels.dense import DTYPES, MOST_HEAD_DIM
from shared.kernels.tiles import TILE
from shared.settings import RouterSettings

log = structlog.get_logger()


def choose_model(
    settings: RouterSettings, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> type[DenseModel]:
    """The form to load, which is logged with its reason.

    Raises:
        StartError: ENABLE_COMPILATION is true and nothing can be compiled here.

    """
    decision = _choose(settings, config, dtype, device)
    log.info("router.compilation", compiled=decision.yes, reason=decision.reason)
    return CompiledModel if decision.yes else DenseModel


def _choose(settings: RouterSettings, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Decision:
    # Also with ENABLE_COMPILATION=true, which the workers read too: their experts may be int8 where this is float16.
    if dtype not in DTYPES:
        return Decision(False, f"our kernel is not for a dense part in {dtype_name(dtype)}")
    if settings.kv_block_tokens % TILE:
        return Decision(False, f"KV_BLOCK_TOKENS={settings.kv_block_tokens} is no multiple of {TILE}")
    if config.head_dim > MOST_HEAD_DIM or config.head_dim % 2:
        return Decision(False, f"our kernel is not for heads of {config.head_dim}: even, at most {MOST_HEAD_DIM}")
    # A CPU that multiplies bfloat16 itself is no reason against it: small steps are bound by calls and by memory.
    return compile_kernels(settings.enable_compilation, dtype, device, native=False)
