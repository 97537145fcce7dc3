"""Torch tensors from checkpoints and to and from the wire."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from shared import wire
from shared.checkpoint.index import TensorIndex
from shared.errors import BadMessageError, CheckpointError
from shared.settings import MIB

TORCH_DTYPE: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
WIRE_DTYPE = {dtype: name for name, dtype in TORCH_DTYPE.items()}

REMAP_BYTES = 64 * MIB
"""A mapped file is mapped anew after so much was read: pages that were copied out no longer count as our memory."""


def to_wire(tensor: torch.Tensor) -> wire.Tensor:
    """`tensor` for a message; shares memory where it lies on the CPU and is contiguous."""
    tensor = tensor.detach().to("cpu").contiguous()
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    data = memoryview(array) if tensor.numel() else memoryview(b"")
    return wire.Tensor(WIRE_DTYPE[tensor.dtype], tuple(tensor.shape), data)  # type: ignore[arg-type]


def check(value: wire.Tensor, name: str, shape: tuple[int | None, ...], dtypes: tuple[str, ...]) -> None:
    """See that a tensor in a message is what it should be.

    Raises:
        BadMessageError: a shape other than `shape` (None: any size) or a dtype not among `dtypes`.

    """
    if value.dtype not in dtypes:
        raise BadMessageError(f"{name}: dtype {value.dtype} is not among {', '.join(dtypes)}")
    if len(value.shape) != len(shape) or any(
        want not in (None, got) for got, want in zip(value.shape, shape, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise BadMessageError(f"{name}: shape {list(value.shape)} is not [{wanted}]")


def from_wire(value: wire.Tensor, name: str, shape: tuple[int | None, ...], dtypes: tuple[str, ...]) -> torch.Tensor:
    """A copy of the tensor in a message.

    Raises:
        BadMessageError: a shape other than `shape` (None: any size) or a dtype not among `dtypes`.

    """
    check(value, name, shape, dtypes)
    if not value.data.nbytes:
        return torch.empty(value.shape, dtype=TORCH_DTYPE[value.dtype])
    # A copy, as torch warns of memory that may only be read, and what it lies in would be kept as long.
    return torch.frombuffer(bytearray(value.data), dtype=TORCH_DTYPE[value.dtype]).reshape(value.shape)


class TensorReader:
    """Copies tensors out of a checkpoint, one file mapped at a time, checking shapes and counting bytes."""

    def __init__(self, index: TensorIndex, device: torch.device, on_bytes: Callable[[int], None]) -> None:
        self._index = index
        self._device = device
        self._on_bytes = on_bytes
        self._open: tuple[Path, Any] | None = None
        self._read_bytes = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = None
        self._stack.close()

    def _file(self, path: Path) -> Any:
        if self._open is None or self._open[0] != path or self._read_bytes >= REMAP_BYTES:
            self._open = None
            self._stack.close()
            self._read_bytes = 0
            self._open = (path, self._stack.enter_context(safe_open(str(path), framework="pt")))
        return self._open[1]

    def copy_into(
        self, target: torch.Tensor, name: str, *, stored: tuple[int, ...] | None = None, row: int | None = None
    ) -> None:
        """Copy tensor `name`, or row `row` of it, into `target`, converting its dtype.

        Raises:
            CheckpointError: missing, of another shape or type than `target` (or `stored`), or unreadable.

        """
        entry = self._index.expect(name, tuple(target.shape) if stored is None else stored)
        try:
            handle = self._file(entry.file)
            source = handle.get_tensor(name) if row is None else handle.get_slice(name)[row]
            target.copy_(source)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{entry.file}: {name} cannot be read: {error}") from None
        self._read_bytes += target.nbytes
        self._on_bytes(target.nbytes)

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Tensor `name` as a fresh tensor [*shape] of `dtype` on the device."""
        target = torch.empty(shape, dtype=dtype, device=self._device)
        self.copy_into(target, name)
        return target
