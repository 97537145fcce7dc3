"""The corpus: what is held out, and batches as a function of the step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shared.errors import StartError
from training.corpus import END_OF_TEXT, Windows, encode, held_out_windows, read_texts
from training.vocabulary import SPECIAL, train_tokenizer


def test_no_held_out_file_is_trained_on_and_more_files_move_none(corpus: Path, tmp_path: Path) -> None:
    texts = read_texts([corpus], "*.py")
    assert len(texts.train) + len(texts.held_out) == 60
    assert not set(texts.train) & set(texts.held_out)
    for file in corpus.iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "one_more.py").write_text("x = 1\n")
    more = read_texts([tmp_path], "*.py")
    assert set(texts.held_out) <= set(more.held_out)
    assert set(texts.train) <= set(more.train)


def test_files_that_are_no_text_are_passed_over(corpus: Path, tmp_path: Path) -> None:
    for file in corpus.iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    assert read_texts([tmp_path], "*.py") == read_texts([corpus], "*.py")


def test_too_little_text_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x")
    with pytest.raises(StartError, match="too few"):
        read_texts([tmp_path], "*.py")
    with pytest.raises(StartError, match="no such file"):
        read_texts([tmp_path / "nowhere"], "*.py")


def test_the_tokenizer_is_lossless_and_documents_end(corpus: Path) -> None:
    texts = read_texts([corpus], "*.py")
    tokenizer = train_tokenizer(texts.train, 320)
    assert [tokenizer.id_to_token(i) for i in range(3)] == list(SPECIAL)
    for text in ("def é(x):\n\treturn '→'\n", texts.held_out[0]):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert (encode(tokenizer, ["a", "b"]) == END_OF_TEXT).sum() == 2


def test_a_step_has_the_same_batch_whatever_came_before() -> None:
    tokens = np.arange(5000, dtype=np.int32)
    one = Windows(tokens, batch_size=8, length=16, seed=3)
    steps = range(2 * one.per_epoch)
    in_order = [one.batch(step) for step in steps]
    backwards = Windows(tokens, batch_size=8, length=16, seed=3)
    for step in reversed(steps):
        assert (backwards.batch(step) == in_order[step]).all()
    first_epoch = np.concatenate(in_order[: one.per_epoch])
    assert len(np.unique(first_epoch[:, 0])) == len(first_epoch)
    assert (np.diff(first_epoch, axis=1) == 1).all()


def test_processes_share_a_batch_without_overlap() -> None:
    windows = Windows(np.arange(5000, dtype=np.int32), batch_size=8, length=16, seed=3)
    parts = [windows.batch(5, process, 4) for process in range(4)]
    assert sorted(np.concatenate(parts)[:, 0]) == sorted(windows.batch(5)[:, 0])


def test_held_out_windows_predict_every_token_once() -> None:
    rows = held_out_windows(np.arange(100, dtype=np.int32), 16)
    assert list(rows[:, 1:].flatten()) == list(range(1, 97))
