"""When memory counts as flat."""

from __future__ import annotations

import pytest

from bench.soak import Memory, growth


def memory(start: float, per_second: float, seconds: int = 600) -> Memory:
    times = [float(t) for t in range(0, seconds, 3)]
    return Memory(times, [start + per_second * t for t in times])


@pytest.mark.parametrize(("per_second", "flat"), [(0, True), (0.01, True), (-0.1, True), (0.05, False)])
def test_growth_is_from_a_tenth_of_the_time_to_the_end(per_second: float, flat: bool) -> None:
    figures = growth({"router": memory(100, per_second)}, 600, 0.05)["router"]
    assert figures["flat"] is flat
    assert figures["mib_per_minute"] == pytest.approx(60 * per_second)
    assert figures["mib_at_a_tenth"] == pytest.approx(100 + 60 * per_second, abs=0.2)


def test_what_is_filled_at_the_start_is_no_growth() -> None:
    warm = Memory([0.0, 30.0, 60.0, 300.0, 599.0], [100.0, 180.0, 200.0, 200.0, 201.0])
    assert growth({"router": warm}, 600, 0.05)["router"]["flat"]


def test_few_samples_are_enough() -> None:
    assert growth({"router": Memory([0.0], [100.0])}, 600, 0.05)["router"]["flat"]
