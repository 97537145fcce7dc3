"""Where each tensor lies: safetensors headers, checked on opening.

The format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from shared.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
SAMPLE_BYTES = 256
ITEMSIZE = {"F32": 4, "F16": 2, "BF16": 2}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...


@dataclass(frozen=True)
class Entry:
    """One tensor: its file, its type, and its bytes' place in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def _read_header(file: Path) -> dict[str, Entry]:
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(f"{file} is truncated or not a safetensors file ({size} bytes)")
            header = json.loads(f.read(length))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{file} is not a safetensors file: its header is no JSON") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} is not a safetensors file: its header is no JSON object")
    entries = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        try:
            begin, end = info["data_offsets"]
            entry = Entry(file, info["dtype"], tuple(info["shape"]), 8 + length + begin, end - begin)
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{file}: the header's entry for {name} is damaged") from None
        numbers = (begin, end, entry.nbytes, *entry.shape)
        if not isinstance(entry.dtype, str) or not all(type(n) is int and n >= 0 for n in numbers):
            raise CheckpointError(f"{file}: the header's entry for {name} is damaged")
        if entry.start + entry.nbytes > size:
            missing = entry.start + entry.nbytes - size
            raise CheckpointError(f"{file} is truncated: {name} ends {missing} bytes after the file's end")
        if entry.dtype in ITEMSIZE and math.prod(entry.shape) * ITEMSIZE[entry.dtype] != entry.nbytes:
            raise CheckpointError(f"{file}: {name} has {entry.nbytes} bytes, its shape says otherwise")
        entries[name] = entry
    return entries


class TensorIndex:
    """All tensors of a checkpoint by name."""

    def __init__(self, path: Path, entries: dict[str, Entry]) -> None:
        self.path = path
        self.entries = entries

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the headers of all files of the folder.

        Raises:
            CheckpointError: a file that the index names is missing, truncated or damaged.

        """
        if (path / INDEX).exists():
            try:
                weight_map = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
                files = sorted({path / name for name in weight_map.values() if Path(name).name == name})
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{path / INDEX} is damaged: {error!r}") from None
        elif (path / SINGLE).exists():
            weight_map, files = {}, [path / SINGLE]
        else:
            raise CheckpointError(f"{path} has neither {SINGLE} nor {INDEX}; only safetensors checkpoints are read")
        entries: dict[str, Entry] = {}
        for file in files:
            if not file.exists():
                raise CheckpointError(f"{file} is missing, {INDEX} names it; download it again")
            entries |= _read_header(file)
        for name in weight_map:
            if name not in entries:
                raise CheckpointError(f"{path / weight_map[name]} lacks {name}, which {INDEX} says it has")
        return cls(path, entries)

    def expect(self, name: str, shape: tuple[int, ...]) -> Entry:
        """The entry of `name`.

        Raises:
            CheckpointError: no such tensor, or of another shape or type.

        """
        entry = self.entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path} lacks the tensor {name}")
        if entry.shape != shape:
            raise CheckpointError(
                f"{entry.file}: {name} has shape {list(entry.shape)}, config.json asks for {list(shape)}"
            )
        if entry.dtype not in ITEMSIZE:
            raise CheckpointError(
                f"{entry.file}: {name} is {entry.dtype}; only float32, float16 and bfloat16 are supported"
            )
        return entry

    def sample_into(self, digest: Digest) -> None:
        """Feed names, shapes and the start, middle and end of every tensor's bytes to `digest`.

        Reading all of a large checkpoint at each start would take minutes; a changed weight tensor differs almost
        everywhere, so samples tell versions apart.
        """
        for file in sorted({entry.file for entry in self.entries.values()}):
            with file.open("rb") as f:
                for name, e in sorted(self.entries.items()):
                    if e.file != file:
                        continue
                    digest.update(f"{name} {e.dtype} {e.shape} ".encode())
                    for at in sorted({0, max(0, e.nbytes // 2 - SAMPLE_BYTES), max(0, e.nbytes - SAMPLE_BYTES)}):
                        f.seek(e.start + at)
                        digest.update(f.read(min(SAMPLE_BYTES, e.nbytes)))
