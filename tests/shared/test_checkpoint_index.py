"""Checkpoint folders: whole ones open, and damaged ones are refused with the file and the tensor named."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.checkpoint import Checkpoint
from shared.checkpoint.index import TensorIndex
from shared.errors import CheckpointError
from shared.settings import DEMO_MODEL

ONE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def safetensors(header: dict[str, Any] | bytes, data: bytes, *, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADER = {"__metadata__": {"format": "pt"}, "a": entry(0, 8, [2]), "b": entry(8, 16, [2, 2], "BF16")}
WHOLE = safetensors(HEADER, bytes(range(16)))


def write(folder: Path, files: dict[str, bytes | dict[str, Any]]) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        TensorIndex.open(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def split(folder: Path) -> Path:
    """A checkpoint in two files."""
    return write(
        folder,
        {
            "1.safetensors": safetensors({"a": entry(0, 8, [2])}, bytes(8)),
            "2.safetensors": safetensors({"b": entry(0, 8, [2])}, bytes(8)),
            INDEX: {"metadata": {}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}},
        },
    )


def test_one_file_is_read(tmp_path: Path) -> None:
    index = TensorIndex.open(write(tmp_path, {ONE: WHOLE}))
    assert set(index.entries) == {"a", "b"}
    b = index.expect("b", (2, 2))
    assert (b.dtype, b.nbytes) == ("BF16", 8)
    assert (tmp_path / ONE).read_bytes()[b.start : b.start + b.nbytes] == bytes(range(8, 16))


def test_several_files_are_read(tmp_path: Path) -> None:
    index = TensorIndex.open(split(tmp_path))
    assert {name: e.file.name for name, e in index.entries.items()} == {"a": "1.safetensors", "b": "2.safetensors"}


def test_a_folder_without_tensors_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"pytorch_model.bin": b"x"})
    assert "only safetensors checkpoints are read" in refusal(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (split(tmp_path) / "2.safetensors").unlink()
    assert refusal(tmp_path) == f"{tmp_path / '2.safetensors'} is missing, {INDEX} names it; download it again"


@pytest.mark.parametrize("kept", [0, 7, 8, 20, len(WHOLE) - 1])
def test_a_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    text = refusal(write(tmp_path, {ONE: WHOLE[:kept]}))
    assert str(tmp_path / ONE) in text
    assert "truncated" in text


def test_a_tensor_that_ends_behind_the_file_is_named(tmp_path: Path) -> None:
    text = refusal(write(tmp_path, {ONE: WHOLE[:-3]}))
    assert text == f"{tmp_path / ONE} is truncated: b ends 3 bytes after the file's end"


@pytest.mark.parametrize(
    "content",
    [
        safetensors(HEADER, b"", length=2**63),
        safetensors(b"{not json", b""),
        safetensors(b"\xff\xfe{}", b""),
        safetensors({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
        safetensors({"a": entry(0, 8, [3])}, bytes(8)),
        safetensors({"a": {**entry(0, 8, [2]), "data_offsets": [0]}}, bytes(8)),
        safetensors({"a": {**entry(0, 8, [2]), "shape": None}}, bytes(8)),
        safetensors({"a": 1}, bytes(8)),
    ],
    ids=["length", "no json", "no utf-8", "no offsets", "shape", "one offset", "no shape", "a number"],
)
def test_a_damaged_header_is_refused_with_its_file(tmp_path: Path, content: bytes) -> None:
    assert str(tmp_path / ONE) in refusal(write(tmp_path, {ONE: content}))


@pytest.mark.parametrize(
    "content",
    [
        safetensors(b"[]", b""),
        safetensors(b"1", b""),
        safetensors(b"[" * 100_000, b""),
        safetensors({"a": entry(0, 8, [2]) | {"shape": [None]}}, bytes(8)),
        safetensors({"a": entry(0, 8, [2]) | {"dtype": ["F32"]}}, bytes(8)),
        safetensors({"a": entry(0, 8, [2]) | {"data_offsets": [0.0, 8.0]}}, bytes(8)),
        safetensors({"a": entry(-8, 0, [2])}, bytes(8)),
        safetensors({"a": entry(0, 8, [-1, -2])}, bytes(8)),
    ],
    ids=["a list", "a number", "deep", "nil size", "dtype list", "float offsets", "negative offset", "negative sizes"],
)
def test_a_hostile_header_is_refused_with_its_file(tmp_path: Path, content: bytes) -> None:
    assert str(tmp_path / ONE) in refusal(write(tmp_path, {ONE: content}))


@pytest.mark.parametrize(
    "index",
    [b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 1}}', b"\xff"],
    ids=["half", "a list", "no map", "a list as map", "a number as file", "no utf-8"],
)
def test_a_damaged_index_is_refused_with_its_file(tmp_path: Path, index: bytes) -> None:
    assert str(tmp_path / INDEX) in refusal(write(split(tmp_path), {INDEX: index}))


def test_a_tensor_that_only_the_index_knows_is_named(tmp_path: Path) -> None:
    split(tmp_path)
    write(tmp_path, {INDEX: {"weight_map": {"a": "1.safetensors", "c": "2.safetensors"}}})
    assert "lacks c" in refusal(tmp_path)


def test_a_file_outside_the_folder_is_not_read(tmp_path: Path) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    write(tmp_path, {"1.safetensors": WHOLE})
    write(inside, {INDEX: {"weight_map": {"a": "../1.safetensors"}}})
    assert "lacks a" in refusal(inside)


def test_a_tensor_of_another_shape_or_type_is_refused_when_it_is_asked_for(tmp_path: Path) -> None:
    header = {"a": entry(0, 8, [2]), "q": entry(8, 10, [2], "I8")}
    index = TensorIndex.open(write(tmp_path, {ONE: safetensors(header, bytes(10))}))
    for name, shape, said in (
        ("missing", (2,), "lacks the tensor missing"),
        ("a", (1, 2), "a has shape [2], config.json asks for [1, 2]"),
        ("q", (2,), "q is I8; only float32, float16 and bfloat16 are supported"),
    ):
        with pytest.raises(CheckpointError) as caught:
            index.expect(name, shape)
        assert said in str(caught.value)


# -- the whole folder ------------------------------------------------------------------------------------------------


def copy_of_demo(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO_MODEL, tmp_path / "demo"))


def test_the_fingerprint_is_that_of_the_contents(tmp_path: Path) -> None:
    original, copy = Checkpoint.open(DEMO_MODEL), Checkpoint.open(copy_of_demo(tmp_path))
    assert original.fingerprint == copy.fingerprint
    assert original.deployment("demo") == f"demo-{original.fingerprint[:8]}"


def _touch_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 12345.0}), encoding="utf-8")


def _touch_tokenizer(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(f"{text}\n", encoding="utf-8")


def _touch_weights(folder: Path) -> None:
    with (folder / ONE).open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))


@pytest.mark.parametrize("touch", [_touch_config, _touch_tokenizer, _touch_weights])
def test_another_version_has_another_fingerprint(tmp_path: Path, touch: Callable[[Path], None]) -> None:
    copy = copy_of_demo(tmp_path)
    touch(copy)
    assert Checkpoint.open(copy).fingerprint != Checkpoint.open(DEMO_MODEL).fingerprint


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^MODEL=.*missing: no such folder"):
        Checkpoint.open(tmp_path / "missing")


@pytest.mark.parametrize("content", [None, b"{", b"[]", b"\xff"], ids=["missing", "half", "a list", "no utf-8"])
def test_a_config_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    copy = copy_of_demo(tmp_path)
    (copy / "config.json").unlink()
    if content is not None:
        (copy / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint.open(copy)
