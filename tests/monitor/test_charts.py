"""Charts: gaps where nothing is known, and cells as hot as their tokens."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.monitor.page.charts import (
    HEIGHT,
    WIDTH,
    Series,
    Value,
    chart,
    heat_class,
    heat_strip,
    runs,
    span,
)

NOW = 1_767_225_600.0


def numbers(svg: str) -> list[tuple[float, float]]:
    """Every point of every line and dot."""
    paths = re.findall(r'class="line c\d" d="M([^"]+)"', svg)
    dots = re.findall(r'cx="([\d.-]+)" cy="([\d.-]+)"', svg)
    points = [tuple(map(float, pair.split())) for path in paths for pair in path.split("L")]
    return [(p[0], p[1]) for p in points] + [(float(x), float(y)) for x, y in dots]


def test_a_line_is_cut_where_a_value_is_unknown_and_where_time_is_missing() -> None:
    points: list[tuple[float, Value]] = [(0, 1), (10, 2), (20, None), (30, 3), (40, 4), (200, 5)]
    assert runs(points) == [[(0, 1.0), (10, 2.0)], [(30, 3.0), (40, 4.0)], [(200, 5.0)]]


def test_of_unknown_values_there_is_no_chart() -> None:
    assert chart("t", "u", [], NOW) == ""
    assert chart("t", "u", [Series("a", [(NOW, None)])], NOW) == ""


def test_zero_is_drawn_and_unknown_is_not() -> None:
    svg = chart("t", "u", [Series("a", [(NOW - 20, 0.0), (NOW - 10, 0.0)]), Series("b", [(NOW, None)])], NOW)
    assert 'class="line c0"' in svg
    assert "c1" not in svg
    assert "now: a 0, b –" in svg


@pytest.mark.parametrize(("oldest", "words"), [(0, "5 minutes"), (301, "15 minutes"), (901, "hour"), (9000, "hour")])
def test_the_axis_is_as_long_as_what_is_known(oldest: float, words: str) -> None:
    assert span([NOW - oldest], NOW)[2] == words


VALUES = st.one_of(st.none(), st.floats(0, 1e12), st.integers(0, 10**9))


@given(st.lists(st.tuples(st.floats(0, 3600), VALUES), max_size=60))
def test_whatever_is_drawn_lies_inside(points: list[tuple[float, Value]]) -> None:
    series = Series("a", sorted((NOW - ago, value) for ago, value in points if value is not None))
    for x, y in numbers(chart("t", "u", [series], NOW)):
        assert 0 <= x <= WIDTH
        assert -0.1 <= y <= HEIGHT


def test_a_title_from_elsewhere_is_escaped() -> None:
    svg = chart('<b>"', "&", [Series("<i>", [(NOW, 1.0)])], NOW)
    assert "<b>" not in svg
    assert "<i>" not in svg


def test_a_cell_is_as_hot_as_its_tokens_compare_with_the_mean() -> None:
    assert heat_class(0, 10) == 0
    assert [heat_class(n, 100) for n in (1, 30, 60, 100, 130, 170, 250, 500)] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_strip_has_a_cell_for_each_expert() -> None:
    assert heat_strip([5, 0, 5, 90], "l").count("M") == 4
    assert 'viewBox="0 0 4 1"' in heat_strip([5, 0, 5, 90], "l")
    assert heat_strip([], "l").count("M") == 0
