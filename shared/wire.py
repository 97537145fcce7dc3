"""Messages on the bus: msgpack maps with `v` = 1, tensors as `[dtype, shape, bytes]`. Pure functions over bytes.

Decoding is bounded and total: whatever the bytes are, the result is a message of the asked type or a `BadMessageError`.
No extension types. docs/protocol.md is the specification.
"""

from __future__ import annotations

import math
from typing import Literal, Self, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from shared.errors import BadMessageError

ITEMSIZE = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 2**31

Dtype = Literal["float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]


class Tensor(msgspec.Struct, array_like=True, frozen=True):
    """A tensor on the wire: little-endian, row-major; `data` has exactly prod(shape) × itemsize bytes."""

    dtype: Dtype
    shape: tuple[int, ...]
    data: memoryview

    def __post_init__(self) -> None:
        if len(self.shape) > MAX_DIMENSIONS:
            raise ValueError(f"a tensor has at most {MAX_DIMENSIONS} dimensions, this one {len(self.shape)}")
        if any(size < 0 for size in self.shape):
            raise ValueError(f"negative size in shape {list(self.shape)}")
        if math.prod(size for size in self.shape if size) >= MAX_ELEMENTS:  # beside a 0: numpy and torch fail at it
            raise ValueError(f"shape {list(self.shape)} is too large")
        expected = math.prod(self.shape) * ITEMSIZE[self.dtype]
        if expected != self.data.nbytes:
            raise ValueError(
                f"{self.dtype} {list(self.shape)} takes {expected} bytes, the message has {self.data.nbytes}"
            )

    @classmethod
    def from_numpy(cls, array: npt.NDArray[np.generic]) -> Self:
        array = np.asarray(array, order="C")  # ascontiguousarray makes one dimension of none
        return cls(array.dtype.name, array.shape, memoryview(array).cast("B") if array.size else memoryview(b""))  # type: ignore[arg-type]

    def to_numpy(self) -> npt.NDArray[np.generic]:
        """A read-only view of the message's bytes; bfloat16, which numpy lacks, is refused."""
        if self.dtype == "bfloat16":
            raise BadMessageError("bfloat16 is not accepted here; send float32")
        return np.frombuffer(self.data, dtype=self.dtype).reshape(self.shape)


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """The base of every message: a msgpack map with the protocol's version."""

    v: Literal[1] = 1


M = TypeVar("M", bound=Message)
_encoder = msgspec.msgpack.Encoder()
_decoders: dict[type[Message], msgspec.msgpack.Decoder[Message]] = {}


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(kind: type[M], data: bytes | memoryview) -> M:
    """The message of type `kind` in `data`.

    Raises:
        BadMessageError: for anything that is not exactly that.

    """
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind)
    try:
        return decoder.decode(data)  # type: ignore[return-value]
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError, MemoryError) as error:
        raise BadMessageError(f"not a {kind.__name__}: {error}") from None
