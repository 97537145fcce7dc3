"""Where torch runs: one thread beside the event loop, which therefore never blocks on it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from shared.checkpoint import ModelConfig
from shared.errors import StartError
from shared.settings import ComputeSettings
from shared.tensors import TORCH_DTYPE

T = TypeVar("T")


class Compute:
    """`await compute(fn, *args)` runs `fn` in the compute thread; calls run one after another, in order."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute", initializer=self._enter)

    @staticmethod
    def _enter() -> None:
        torch.set_grad_enabled(False)

    async def __call__(self, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)


def set_threads(settings: ComputeSettings) -> None:
    """Torch's threads of this process: as set, or half of the cores it may use, as its neighbours compute too."""
    torch.set_num_threads(settings.torch_threads or max(1, len(os.sched_getaffinity(0)) // 2))


def select_device(settings: ComputeSettings) -> torch.device:
    """The torch device of the setting DEVICE.

    Raises:
        StartError: cuda is asked for and this machine or this build of torch has none.

    """
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise StartError(f"DEVICE={settings.device}: torch {torch.__version__} finds no CUDA device here")
    return torch.device(settings.device)


def select_dtype(settings: ComputeSettings, config: ModelConfig) -> torch.dtype:
    return TORCH_DTYPE[config.dtype if settings.dtype == "auto" else settings.dtype]
