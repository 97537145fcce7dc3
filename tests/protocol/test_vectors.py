"""Our wire code, the plain msgpack package and docs/protocol.md agree on the test vectors."""

from __future__ import annotations

import json
import re
from typing import Any

import msgpack
import msgspec
import numpy as np
import pytest

from services.router.messages import Sampling
from shared import wire
from shared.errors import BadMessageError
from shared.tensors import TORCH_DTYPE, from_wire, to_wire
from tests.protocol import make_vectors
from tests.protocol.kinds import KINDS, PROTOCOL, VECTORS

FENCE = re.compile(r"^```hex\n# (?P<name>.+)\n(?P<hex>[0-9a-f\s]+)^```$", re.MULTILINE)
ROW = re.compile(r"^\| `(?P<field>\w+)` \| (?P<rest>.*) \|$", re.MULTILINE)


def by_name(section: str) -> pytest.MarkDecorator:
    """Parametrize a test with the vectors of one section of the file."""
    vectors = VECTORS[section]
    return pytest.mark.parametrize("vector", vectors, ids=[vector["name"] for vector in vectors])


def unpack(raw: bytes) -> Any:
    return msgpack.unpackb(raw, strict_map_key=False)


def complete(kind: str, message: dict[str, Any]) -> dict[str, Any]:
    """`message` with what it leaves out."""
    defaults = make_vectors.from_json(VECTORS["defaults"][kind])
    whole = {**defaults, **message}
    if kind == "GenerateRequest":
        whole["sampling"] = {**defaults["sampling"], **whole["sampling"]}
    if kind == "GenerateChunk":
        whole["logprobs"] = [[*item, []][:4] for item in whole["logprobs"]]
    return whole


def known(kind: str, message: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key in {f.encode_name for f in fields(kind)}}


def fields(kind: str) -> tuple[msgspec.structs.FieldInfo, ...]:
    return msgspec.structs.fields(KINDS[kind])


def test_the_file_is_what_make_vectors_makes() -> None:
    assert make_vectors.FILE.read_text(encoding="utf-8") == make_vectors.text(), "run tests/protocol/make_vectors.py"


def test_every_message_type_has_vectors() -> None:
    assert {vector["type"] for vector in VECTORS["messages"]} == set(KINDS)
    assert {vector["type"] for vector in VECTORS["hostile"]} == set(KINDS)


def test_every_dtype_has_vectors() -> None:
    assert {vector["value"][0] for vector in VECTORS["tensors"]} == set(wire.ITEMSIZE)


@by_name("messages")
def test_we_read_a_message_as_it_is_meant(vector: dict[str, Any]) -> None:
    kind = vector["type"]
    message = wire.decode(KINDS[kind], bytes.fromhex(vector["hex"]))
    meaning = complete(kind, known(kind, make_vectors.from_json(vector["value"])))
    assert as_plain(message) == as_plain(meaning)


@by_name("messages")
def test_plain_msgpack_reads_what_we_write(vector: dict[str, Any]) -> None:
    kind = vector["type"]
    message = wire.decode(KINDS[kind], bytes.fromhex(vector["hex"]))
    written = unpack(wire.encode(message))
    meaning = complete(kind, known(kind, make_vectors.from_json(vector["value"])))
    assert complete(kind, written) == meaning
    required = {field.encode_name for field in fields(kind) if field.required}
    assert required <= set(written), "a required field was left out"


@by_name("messages")
def test_plain_msgpack_agrees_with_the_vector(vector: dict[str, Any]) -> None:
    raw, meaning = bytes.fromhex(vector["hex"]), make_vectors.from_json(vector["value"])
    assert unpack(raw) == meaning
    if vector["form"] == "short":
        assert msgpack.packb(meaning) == raw


def test_the_defaults_are_those_of_our_types() -> None:
    for kind in KINDS:
        ours = {f.encode_name: f.default for f in fields(kind) if f.default is not msgspec.NODEFAULT}
        ours |= {f.encode_name: f.default_factory() for f in fields(kind) if f.default_factory is not msgspec.NODEFAULT}
        assert as_plain(ours) == VECTORS["defaults"][kind], kind


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_messages_are_refused(kind: str) -> None:
    wrong = {}
    for vector in VECTORS["hostile"]:
        if vector["type"] != kind:
            continue
        raw = bytes.fromhex(vector["hex"])
        if then := vector.get("then"):
            raw += bytes.fromhex(then["hex"]) * then["times"]
        try:
            wrong[vector["name"]] = repr(wire.decode(KINDS[kind], raw))[:200]
        except BadMessageError:
            continue
        except Exception as error:
            wrong[vector["name"]] = repr(error)
    assert not wrong


class Holder(wire.Message, frozen=True, kw_only=True):
    tensor: wire.Tensor


def hold(vector: dict[str, Any]) -> wire.Tensor:
    """The vector's tensor, decoded by us."""
    return wire.decode(Holder, b"\x81\xa6tensor" + bytes.fromhex(vector["hex"])).tensor


@by_name("tensors")
def test_a_tensors_numbers_are_what_the_vector_says(vector: dict[str, Any]) -> None:
    dtype, shape, data = make_vectors.from_json(vector["value"])
    tensor = hold(vector)
    assert (tensor.dtype, list(tensor.shape), bytes(tensor.data)) == (dtype, shape, data)
    torch_tensor = from_wire(tensor, "tensor", tuple(shape), (dtype,))
    assert torch_tensor.flatten().tolist() == vector["numbers"]
    if dtype == "bfloat16":
        with pytest.raises(BadMessageError):
            tensor.to_numpy()
    else:
        assert tensor.to_numpy().flatten().tolist() == vector["numbers"]
        assert list(tensor.to_numpy().shape) == shape


@by_name("tensors")
def test_we_write_a_tensor_byte_for_byte(vector: dict[str, Any]) -> None:
    raw = bytes.fromhex(vector["hex"])
    dtype, shape, data = make_vectors.from_json(vector["value"])
    assert unpack(raw) == [dtype, shape, data]
    assert msgpack.packb([dtype, shape, data]) == raw
    tensor = hold(vector)
    torch_tensor = from_wire(tensor, "tensor", tuple(shape), (dtype,))
    assert torch_tensor.dtype == TORCH_DTYPE[dtype]
    assert wire.encode(Holder(tensor=to_wire(torch_tensor))).endswith(b"\xa6tensor" + raw)
    if dtype != "bfloat16" and shape:
        made = wire.Tensor.from_numpy(tensor.to_numpy())
        assert wire.encode(Holder(tensor=made)).endswith(b"\xa6tensor" + raw)


def test_a_scalar_of_numpy_stays_a_scalar() -> None:
    assert wire.Tensor.from_numpy(np.array(1.5, np.float32)).shape == ()


def test_a_tensor_that_is_not_contiguous_is_written_row_by_row() -> None:
    array = np.arange(6, dtype=np.int16).reshape(2, 3).T
    tensor = wire.Tensor.from_numpy(array)
    assert (tensor.shape, bytes(tensor.data)) == ((3, 2), np.ascontiguousarray(array).tobytes())


def as_plain(value: Any) -> Any:
    """A message of ours in the file's own JSON."""
    if isinstance(value, wire.Tensor):
        return [value.dtype, list(value.shape), {"bytes": bytes(value.data).hex()}]
    if isinstance(value, msgspec.Struct):
        items = [(f.encode_name, as_plain(getattr(value, f.name))) for f in msgspec.structs.fields(value)]
        return [item for _, item in items] if value.__struct_config__.array_like else dict(items)
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    if isinstance(value, dict):
        return make_vectors.as_json({key: as_plain(item) for key, item in value.items()})
    return make_vectors.as_json(value)


# -- the document ----------------------------------------------------------------------------------------------------


def section(heading: str) -> str:
    """The text of docs/protocol.md under `### heading`."""
    text = PROTOCOL.read_text(encoding="utf-8")
    found = re.search(rf"^### `?{heading}`?$(?P<body>.*?)(?=^#{{2,3}} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"docs/protocol.md has no section {heading}"
    return found["body"]


def documented(heading: str) -> dict[str, str]:
    """Field -> its default, `required` for none, as the document's table says."""
    rows = {row["field"]: row["rest"].split(" | ") for row in ROW.finditer(section(heading))}
    return {field: cells[1] for field, cells in rows.items()}


@pytest.mark.parametrize("kind", [*KINDS, "Sampling"])
def test_the_document_names_every_field_and_its_default(kind: str) -> None:
    rows = documented(kind)
    struct: type[msgspec.Struct] = Sampling if kind == "Sampling" else KINDS[kind]
    defaults = VECTORS["defaults"]
    expected = defaults["GenerateRequest"]["sampling"] if kind == "Sampling" else defaults[kind]
    assert set(rows) == {field.encode_name for field in msgspec.structs.fields(struct)}
    for field, default in rows.items():
        if field not in expected:
            assert default == "required", field
        elif (kind, field) != ("GenerateRequest", "sampling"):
            assert json.loads(default.strip("`").replace("nil", "null")) == expected[field], field


def test_the_documents_bytes_are_those_of_the_vectors() -> None:
    vectors = {vector["name"]: vector for section in ("tensors", "messages", "hostile") for vector in VECTORS[section]}
    shown = {match["name"]: match["hex"] for match in FENCE.finditer(PROTOCOL.read_text(encoding="utf-8"))}
    assert {vectors[name].get("type") for name in shown} == {*KINDS, None}, "a vector of each type, and a tensor's"
    for name, digits in shown.items():
        assert "".join(digits.split()) == vectors[name]["hex"], name


def test_the_document_lists_every_dtype_and_error_code() -> None:
    from shared.errors import HTTP_STATUS

    text = PROTOCOL.read_text(encoding="utf-8")
    for dtype, itemsize in wire.ITEMSIZE.items():
        assert re.search(rf"^\| `{dtype}` \| {itemsize} \|", text, re.MULTILINE), dtype
    for code, status in HTTP_STATUS.items():
        assert re.search(rf"^\| `{code}` \| {status} \|", text, re.MULTILINE), code
