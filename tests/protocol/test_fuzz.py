"""Whatever the bytes are, decoding gives a message of the asked type or a BadMessageError; tensors survive the journey."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import msgpack
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared import wire
from shared.errors import BadMessageError
from shared.tensors import from_wire, to_wire
from tests.protocol import make_vectors
from tests.protocol.kinds import KINDS, VECTORS

EXAMPLES = 300
fuzzed = settings(
    max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)

kinds = st.sampled_from(sorted(KINDS.values(), key=lambda kind: kind.__name__))
valid = st.sampled_from([(KINDS[v["type"]], bytes.fromhex(v["hex"])) for v in VECTORS["messages"]])
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=8))
    | st.builds(msgpack.Timestamp, st.integers(0, 2**34 - 1), st.integers(0, 999_999_999))
)
keys = st.text(max_size=4) | st.integers(-5, 5)
anything = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
)
tensor_like = st.tuples(
    st.sampled_from([*wire.ITEMSIZE, "float64", ""]),
    st.lists(st.integers(-2, 2**64 - 1) | st.integers(0, 3), max_size=10),
    st.binary(max_size=32),
).map(list)


def check(kind: type[wire.Message], data: bytes) -> None:
    """`data` is refused, or is a message that survives being sent on."""
    with contextlib.suppress(BadMessageError):
        message = wire.decode(kind, data)
        assert isinstance(message, kind)
        again = wire.encode(message)
        assert wire.encode(wire.decode(kind, again)) == again


@fuzzed
@given(kinds, st.binary(max_size=200))
def test_any_bytes(kind: type[wire.Message], data: bytes) -> None:
    check(kind, data)


@fuzzed
@given(kinds, anything)
def test_any_msgpack(kind: type[wire.Message], value: Any) -> None:
    check(kind, msgpack.packb(value))


@fuzzed
@given(valid, st.data())
def test_a_valid_message_with_bytes_changed(sample: tuple[type[wire.Message], bytes], data: st.DataObject) -> None:
    kind, raw = sample
    changed = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 4), "changes")):
        at = data.draw(st.integers(0, len(changed)), "at")
        end = min(len(changed), at + data.draw(st.integers(0, 4), "removed"))
        changed[at:end] = data.draw(st.binary(max_size=4), "put in")
    check(kind, bytes(changed))


@fuzzed
@given(valid, st.data())
def test_a_valid_message_with_a_value_changed(sample: tuple[type[wire.Message], bytes], data: st.DataObject) -> None:
    kind, raw = sample
    message = msgpack.unpackb(raw, strict_map_key=False)
    for key in data.draw(st.sets(st.sampled_from(sorted(message)), min_size=1, max_size=2), "keys"):
        message[key] = data.draw(anything | tensor_like, key)
    check(kind, msgpack.packb(message))


@fuzzed
@given(valid, st.data())
def test_a_message_cut_short(sample: tuple[type[wire.Message], bytes], data: st.DataObject) -> None:
    kind, raw = sample
    end = data.draw(st.integers(0, len(raw) - 1), "length")
    try:
        wire.decode(kind, raw[:end])
    except BadMessageError:
        return
    raise AssertionError("a part was taken for the whole")


class Holder(wire.Message, frozen=True, kw_only=True):
    tensor: wire.Tensor


@st.composite
def tensors(draw: st.DrawFn) -> wire.Tensor:
    dtype = draw(st.sampled_from(sorted(wire.ITEMSIZE)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=wire.MAX_DIMENSIONS)))
    count = math.prod(shape) if math.prod(shape) <= 64 else 0
    shape = shape if count else (*shape[:-1], 0)
    if dtype == "bool":
        data = bytes(draw(st.lists(st.integers(0, 1), min_size=count, max_size=count)))
    else:
        size = count * wire.ITEMSIZE[dtype]
        data = draw(st.binary(min_size=size, max_size=size))
    return wire.Tensor(dtype, shape, memoryview(data))  # type: ignore[arg-type]


def same(one: wire.Tensor, other: wire.Tensor) -> bool:
    return (one.dtype, one.shape, bytes(one.data)) == (other.dtype, other.shape, bytes(other.data))


@fuzzed
@given(tensors())
def test_a_tensor_survives_the_journey(tensor: wire.Tensor) -> None:
    arrived = wire.decode(Holder, wire.encode(Holder(tensor=tensor))).tensor
    assert same(arrived, tensor)
    assert same(to_wire(from_wire(arrived, "tensor", tensor.shape, (tensor.dtype,))), tensor)
    if tensor.dtype != "bfloat16" and tensor.shape:
        assert same(wire.Tensor.from_numpy(arrived.to_numpy()), tensor)
    unpacked = msgpack.unpackb(wire.encode(Holder(tensor=tensor)))["tensor"]
    assert unpacked == [tensor.dtype, list(tensor.shape), bytes(tensor.data)]


@fuzzed
@given(st.lists(st.floats(width=32), min_size=1, max_size=16))
def test_numbers_survive_the_journey(numbers: list[float]) -> None:
    packed = msgpack.packb({"tensor": make_vectors.tensor("float32", [len(numbers)], numbers)})
    arrived = wire.decode(Holder, packed).tensor
    assert np.array_equal(arrived.to_numpy(), np.array(numbers, np.float32), equal_nan=True)


@fuzzed
@given(tensors(), st.lists(st.none() | st.integers(0, 3), max_size=4), st.sampled_from(sorted(wire.ITEMSIZE)))
def test_a_tensor_of_another_shape_or_dtype_is_refused(
    tensor: wire.Tensor, shape: list[int | None], dtype: str
) -> None:
    fits = dtype == tensor.dtype and len(shape) == len(tensor.shape)
    fits = fits and all(want in (None, got) for want, got in zip(shape, tensor.shape, strict=True))
    try:
        from_wire(tensor, "tensor", tuple(shape), (dtype,))
    except BadMessageError:
        assert not fits
    else:
        assert fits
