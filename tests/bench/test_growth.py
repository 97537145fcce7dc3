"""What bench.growth makes of the services' metrics, and the points it measures."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from bench.growth import (
    LABELS,
    SIMULATED_PAIR_MS,
    TOKENS,
    Point,
    Reading,
    choose,
    merged,
    points,
    read,
    result,
    save,
    svg,
    tables,
    window,
)


def metrics(layers: int, seconds: float, times: int) -> str:
    registry = CollectorRegistry()
    dispatch = Histogram("moe_dispatch_seconds", "one layer", ["layer"], registry=registry)
    for layer in range(layers):
        for _ in range(times):
            dispatch.labels(str(layer)).observe(seconds)
    return generate_latest(registry).decode()


def results(axis: str) -> list[dict[str, Any]]:
    speeds = {"tokens_per_second": 200.0, "dispatch_ms": 5.0, "compute_ms": 2.0, "step_ms": 9.0, "step_tokens": 16.0}
    return [result(point, [{**speeds, "cores": {"router": 0.5}}]) for point in choose([axis])]


def test_metrics_are_added_up_over_processes_and_layers() -> None:
    found = read([metrics(2, 0.5, 3), metrics(1, 1.0, 4), "# nothing of ours\nother_total 7.0\n"])
    assert found == {"moe_dispatch_seconds_sum": 7.0, "moe_dispatch_seconds_count": 10.0}


def test_a_window_has_rates_and_means_of_what_changed() -> None:
    before, after = Counter[str](), Counter[str]()
    before.update({TOKENS: 100, "moe_dispatch_seconds_sum": 10, "moe_dispatch_seconds_count": 20})
    after.update({TOKENS: 400, "moe_dispatch_seconds_sum": 11, "moe_dispatch_seconds_count": 220})
    found = window(Reading(5, before, Counter(router=3)), Reading(7, after, Counter(router=4)))
    assert found["tokens_per_second"] == 150
    assert found["dispatch_ms"] == pytest.approx(5)
    assert found["cores"] == {"router": 0.5}


def test_overhead_is_what_a_dispatch_takes_beside_the_compute() -> None:
    assert {r["overhead_ms"] for r in results("experts")} == {3.0}


def test_the_ideal_of_a_simulation_grows_with_its_workers() -> None:
    found = [r for r in results("simulated") if r["streams"] == 16]
    ideal = {r["value"]: r["ideal_tokens_per_second"] for r in found}
    assert ideal[16] == pytest.approx(16 * ideal[1], rel=0.01)
    slept = {r["value"]: r["compute_ms"] for r in found}
    assert slept[1] == 16 * 16 * SIMULATED_PAIR_MS
    assert slept[16] == 16 * SIMULATED_PAIR_MS


def test_every_axis_has_points_and_none_is_there_twice() -> None:
    places = [(p.axis, p.line, p.value) for p in points()]
    assert len(set(places)) == len(places)
    assert {axis for axis, _, _ in places} == set(LABELS)


def test_a_new_measurement_takes_the_place_of_the_old_one() -> None:
    old, new = results("workers"), [{**results("workers")[1], "tokens_per_second": 999.0}]
    both = merged(old, new)
    assert [r["value"] for r in both] == [1, 2, 4, 8]
    assert [r["tokens_per_second"] for r in both] == [200.0, 999.0, 200.0, 200.0]
    assert [r["axis"] for r in merged(old, results("experts"))] == ["experts"] * 5 + ["workers"] * 4


def test_what_is_saved_stays_when_another_axis_is_measured(tmp_path: Path) -> None:
    save(results("batch"), tmp_path)
    save(results("routers"), tmp_path)
    kept = json.loads((tmp_path / "growth.json").read_text())["points"]
    assert [r["axis"] for r in kept] == ["routers"] * 2 + ["batch"] * 7
    assert {path.name for path in tmp_path.iterdir()} == {"growth.json", "growth-tables.md", "growth.svg"}


def test_axes_and_values_can_be_chosen() -> None:
    chosen: list[Point] = choose(["batch=64,1", "routers"])
    assert [(p.axis, p.value) for p in chosen] == [("batch", 1), ("batch", 64), ("routers", 1), ("routers", 2)]


@pytest.mark.parametrize(("wanted", "said"), [("batch=3", "1, 2, 4, 8, 16, 32, 64"), ("layers", "experts, workers")])
def test_a_wrong_choice_lists_what_there_is(wanted: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        choose([wanted])


def test_every_axis_has_a_table_and_two_plots() -> None:
    all_results = [r for axis in LABELS for r in results(axis)]
    assert tables(all_results).count("\n|---|") == len(LABELS)
    root = ET.fromstring(svg(all_results))  # noqa: S314 - our own text
    assert len(root.findall(".//{*}svg")) == 2 * len(LABELS)
