"""bench.fuzz over a few thousand messages; and what it says when a decoder is wrong."""

from __future__ import annotations

import pytest

from bench.fuzz import Decoders, Maker, case, fuzz, main

MESSAGES = 20_000


def test_nothing_but_the_typed_error_comes_of_any_message() -> None:
    result = fuzz(1, range(MESSAGES))
    assert result["messages"] == MESSAGES
    assert result["refused"] > MESSAGES / 3
    assert result["accepted"] > MESSAGES / 50
    made = result["made"]
    assert made["message, valid"]["accepted"] > 0
    assert made["report, valid"]["refused"] > 0, "most vectors are no reports"
    assert all(counts["refused"] for name, counts in made.items() if name.endswith(("cut short", "bytes")))


def test_a_message_depends_on_its_seed_and_index_alone() -> None:
    maker, decoders = Maker(), Decoders()
    first = [case(3, index, maker, decoders).shown for index in range(200)]
    assert [case(3, index, Maker(), decoders).shown for index in reversed(range(200))] == first[::-1]
    assert [case(4, index, maker, decoders).shown for index in range(200)] != first


class Wrong(Decoders):
    """A decoder with a bug."""

    def message(self, name: str, data: bytes) -> bool:
        if b"\xff" in data:
            raise OverflowError("int too big")
        return super().message(name, data)


def test_any_other_exception_ends_it_and_says_how_to_see_it_again(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        fuzz(1, range(MESSAGES), Wrong())
    said = str(caught.value.code)
    assert "OverflowError: int too big" in said
    assert "ff" in said.splitlines()[1]
    index = int(said.rpartition("--only ")[2])
    with pytest.raises(SystemExit) as again:
        fuzz(1, range(index, index + 1), Wrong())
    assert again.value.code == said
    capsys.readouterr()
    with pytest.raises(SystemExit) as right:
        main(["--seed", "1", "--only", str(index)])
    assert right.value.code == 0
    assert '"messages": 1' in capsys.readouterr().out
