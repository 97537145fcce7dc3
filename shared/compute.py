"""Where torch runs: one thread beside the event loop, which therefore never blocks on it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from shared.checkpoint import ModelConfig
from shared.errors import StartError
from shared.settings import MIB, ComputeSettings
from shared.tensors import TORCH_DTYPE

T = TypeVar("T")

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""glibc's malloc.h."""


FEW_ROWS = 64
"""Work on so few rows of hidden states is over sooner than it is handed to another thread and back."""


class Compute:
    """`await compute(fn, *args)` runs `fn` in the compute thread; calls run one after another, in order.

    With `rows`, how many rows of hidden states it is about, work on a few runs at once, where it is asked for. Handing
    it over would cost two wake-ups and the interpreter's lock at every one of its torch calls.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute", initializer=self._enter)

    @staticmethod
    def _enter() -> None:
        torch.set_grad_enabled(False)

    async def __call__(self, function: Callable[..., T], *args: object, rows: int | None = None) -> T:
        if rows is not None and rows <= FEW_ROWS:
            with torch.no_grad():
                return function(*args)
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)


def set_threads(settings: ComputeSettings) -> None:
    """Torch's threads of this process: as set, or half of the cores it may use, as its neighbours compute too."""
    global _most_threads  # noqa: PLW0603 - as torch's own number is: one for the process
    cores = len(os.sched_getaffinity(0))
    _most_threads = settings.torch_threads or cores
    torch.set_num_threads(settings.torch_threads or max(1, cores // 2))


_most_threads = 1


def most_threads() -> int:
    """Threads for work on which this process' neighbours wait: TORCH_THREADS, or as many as it may use cores."""
    return _most_threads


@contextlib.contextmanager
def all_threads() -> Iterator[None]:
    """For a large product while the neighbours wait for this process: TORCH_THREADS, or all cores.

    Small ones lose more by waking the other threads than these save. Switching takes a tenth of a microsecond.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, _most_threads))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For activations: torch splits large ones in the middle of a row, and rounds the ends of what it splits otherwise.

    So which row of a batch is rounded how would depend on the others.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next step; elsewhere, do nothing.

    Each step makes and frees the same tensors of some megabytes. By default glibc gives such pieces back to the kernel
    at once and gets them again page by page, which took longer than the attention that filled them. To be called before
    other threads allocate. Source: mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in ((M_MMAP_THRESHOLD, 32 * MIB), (M_TRIM_THRESHOLD, 128 * MIB), (M_ARENA_MAX, 1)):
            mallopt(option, value)


def give_back_memory() -> None:
    """Return what is free to the kernel: loading leaves holes of many megabytes. Source: malloc_trim(3)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


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
