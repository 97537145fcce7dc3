"""What bench.generation makes of the rates that it measures."""

from __future__ import annotations

import pytest

from bench.generation import ROWS, result, table


def test_ratios_are_of_the_same_round() -> None:
    found = result(
        "1 stream", [30.0, 10.0, 20.0], {"slow": [10.0, 10.0, 5.0], "fast": [40.0, 40.0, 40.0]}, [0.0, 0.3, 0.1]
    )
    assert found["openmoe"] == 20.0
    assert found["peers"]["slow"] == {"rate": 10.0, "ratio": 3.0, "least": 1.0, "greatest": 4.0}
    assert found["peers"]["fast"] == {"rate": 40.0, "ratio": 0.5, "least": 0.25, "greatest": 0.75}
    assert found["best"] == "fast"
    assert found["rounds"] == 3
    assert found["others_cores"] == 0.3


def test_a_round_that_a_peer_lacks_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        result("1 stream", [30.0, 10.0], {"slow": [10.0]}, [0.0, 0.0])


def test_the_table_has_every_peer_and_the_best_one() -> None:
    results = [result(row.name, [30.0], {"a": [10.0], "b": [60.0]}, [0.0]) for row in ROWS]
    head, _, first, *more = table("tiny", results).splitlines()
    assert head == "| checkpoint | row | a | b | OpenMoE | ratio to a | ratio to b | ratio to the best |"
    assert first == (
        "| tiny | 1 stream, output tokens/s | 10.0 | 60.0 | 30.0 | 3.00 (3.00 to 3.00) | 0.50 (0.50 to 0.50) | "
        "0.50 (0.50 to 0.50), b |"
    )
    assert len(more) == len(ROWS) - 1


def test_new_tokens_count_and_the_prompts_where_one_is_made() -> None:
    assert [r.counted for r in ROWS] == [64, 1024, 1024]
