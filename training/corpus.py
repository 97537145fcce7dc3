"""The text that is learned: files, split by name into training and held-out ones, as windows of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from shared.errors import StartError

HELD_OUT_OF = 20
"""One file in so many is held out."""
SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3"})
END_OF_TEXT = 0

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Texts:
    """Training and held-out documents."""

    train: list[str]
    held_out: list[str]

    @property
    def held_out_bytes(self) -> int:
        return sum(len(text.encode()) for text in self.held_out)


def find_files(sources: Sequence[Path], pattern: str) -> Iterator[tuple[str, Path]]:
    """(name, path) of each file, in an order that does not depend on the file system; names are relative."""
    for source in sources:
        if source.is_file():
            yield source.name, source
            continue
        if not source.is_dir():
            raise StartError(f"--data {source}: no such file or folder")
        for path in sorted(source.rglob(pattern)):
            relative = path.relative_to(source)
            if path.is_file() and not SKIPPED_FOLDERS.intersection(relative.parts):
                yield relative.as_posix(), path


def read_texts(sources: Sequence[Path], pattern: str) -> Texts:
    """Read all files that are UTF-8; a file is held out by its name's hash, so that more data moves no file.

    Raises:
        StartError: a source is missing, or there is too little text to split.

    """
    texts = Texts([], [])
    for name, path in find_files(sources, pattern):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip():
            digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
            (texts.held_out if digest % HELD_OUT_OF == 0 else texts.train).append(text)
    if not texts.train or not texts.held_out:
        where = ", ".join(str(source) for source in sources)
        raise StartError(f"--data {where}: too few {pattern} files to train on some and hold some out")
    return texts


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Tokens:
    """All documents as one array [N], each followed by the end-of-text token."""
    parts = [np.array([*e.ids, END_OF_TEXT], dtype=np.int32) for e in tokenizer.encode_batch(list(texts))]
    return np.concatenate(parts)


class Windows:
    """Training batches as a function of the step: resuming needs no state."""

    def __init__(self, tokens: Tokens, *, batch_size: int, length: int, seed: int) -> None:
        self._tokens = tokens
        self._batch_size = batch_size
        self._length = length
        self._seed = seed
        self.per_epoch = (len(tokens) - length - 1) // length // batch_size
        if self.per_epoch < 1:
            raise StartError(
                f"{len(tokens)} tokens are fewer than one batch of {batch_size} sequences of {length}; "
                "give more data, or lower --batch-size or --sequence-length"
            )
        self._epoch = -1
        self._starts: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def batch(self, step: int, process: int = 0, processes: int = 1) -> Tokens:
        """The rows that fall to this process of step `step`'s batch: [batch_size / processes, length + 1]."""
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            random = np.random.default_rng([self._seed, epoch])
            shift = int(random.integers(self._length))
            count = (len(self._tokens) - shift - 1) // self._length
            self._starts = random.permutation(count) * self._length + shift
            self._epoch = epoch
        starts = self._starts[index * self._batch_size : (index + 1) * self._batch_size][process::processes]
        return np.stack([self._tokens[start : start + self._length + 1] for start in starts])


def held_out_windows(tokens: Tokens, length: int) -> Tokens:
    """Non-overlapping windows [n, length + 1], each sharing its last token with the next one's first."""
    count = (len(tokens) - 1) // length
    return np.stack([tokens[i * length : i * length + length + 1] for i in range(count)])
