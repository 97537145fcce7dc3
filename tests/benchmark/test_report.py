"""Tables, report.json and report.html."""

from __future__ import annotations

import io
import json
import math
import re
import xml.etree.ElementTree as ET
from array import array
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from rich.console import Console

from services.benchmark import Length, Outcome, Plan
from services.benchmark_figures import row
from services.benchmark_html import html
from services.benchmark_plots import Axis, Line, log_ticks, nice_ticks, plot
from services.benchmark_report import folder, milliseconds, notes, report, tables, write
from services.benchmark_requests import Sample, ServedModel
from shared.errors import StartError

ANY = st.floats(-1e12, 1e12).map(lambda v: round(v, 6)) | st.sampled_from([0.0, math.nan, math.inf, -math.inf])
EVIL = "</style><script>alert(1)</script>'\"&[red]"
PLAN = Plan("http://h:1/?a=1&b=<2>", concurrency=(1, 4), rates=(2.5,), length=Length(duration=8), api_key="very-secret")


def outcome(text: str = EVIL) -> Outcome:
    good = [Sample(t, t, t + 2, array("d", (t + 1, t + 1.5, t + 2)), 10, 3) for t in range(5)]
    bad = Sample(0, 0, 1, failure=text, detail=text)
    rows = [row("closed", 1, good, 0, 8), row("closed", 4, [*good, bad], 0, 8), row("open", 2.5, good, 0, 8)]
    return Outcome(ServedModel(text), text, rows)


class Strict(HTMLParser):
    """Sees that tags are closed in order, and collects what a page could fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_nothing_from_outside_is_code() -> None:
    page = html(report(PLAN, outcome()))
    seen = Strict()
    seen.feed(page)
    assert seen.open == []
    assert not seen.tags & {"script", "img", "link", "iframe", "image", "use", "a"}
    assert not {name for name in seen.attributes if name.startswith("on") or name in {"src", "href"}}
    assert "url(" not in page
    assert page.count("<svg") == 14
    assert "&lt;script&gt;" in page
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ET.fromstring(svg)  # noqa: S314 - our own


def test_the_page_of_forward_requests_has_no_token_plots() -> None:
    plan = Plan("http://h", shape="forward", concurrency=(1,))
    samples = [Sample(t, t, t + 0.01, input_tokens=1) for t in range(5)]
    page = html(report(plan, Outcome(ServedModel("m"), None, [row("closed", 1, samples, 0, 5)])))
    assert "Throughput" in page
    assert "Inter-token" not in page


def test_a_run_where_nothing_came_back_still_has_a_page() -> None:
    failed = [Sample(0, 0, 1, failure="HTTP 503")]
    page = html(report(PLAN, Outcome(ServedModel("m"), None, [row("closed", 1, failed, 0, 5)], interrupted=True)))
    assert "1 failed: HTTP 503" in page
    assert "interrupted" in page


def test_json_has_every_figure_and_no_key(tmp_path: Path) -> None:
    data, page = write(folder(tmp_path / "new" / "folder"), report(PLAN, outcome()))
    text = data.read_text()
    assert "very-secret" not in text + page.read_text()
    read = json.loads(text)
    assert read["schema"] == 1
    assert (read["command"]["seed"], read["server"]["model"], read["machine"]["cores"] >= 1) == (0, EVIL, True)
    assert [r["name"] for r in read["rows"]] == ["1 stream", "4 streams", "2.5 req/s"]
    assert read["rows"][1]["failures"] == {EVIL: 1}
    assert read["rows"][0]["inter_token_latency"]["p99"] == 0.5
    assert html(read) == page.read_text(), "the page is that of the JSON"


def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartError, match="--output"):
        folder(tmp_path / "file")


def test_a_folder_is_made_only_when_there_is_a_report(tmp_path: Path) -> None:
    assert not folder(tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    assert folder(tmp_path / "old").exists()


def test_the_tables_fit_a_terminal_and_show_failures() -> None:
    console = Console(width=80, file=io.StringIO(), record=True)
    came = outcome()
    for table in tables(PLAN, came.rows):
        console.print(table)
    for note in notes(came.rows):
        console.print(note)
    text = console.export_text()
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "500" in text
    assert f"failed: 4 streams: 1 × {EVIL[:8]}" in text


def test_a_generator_at_its_limit_says_so() -> None:
    late = [Sample(t, t + 0.2, t + 1, array("d", (t + 1,)), 1, 1) for t in range(5)]
    assert "load generator" in str(notes([row("open", 1, late, 0, 5)])[0])
    assert "load generator" in str(notes([row("closed", 1, [], 0, 5, generator_cpu=0.95)])[0])
    assert notes([row("closed", 1, late, 0, 5)]) == []


@pytest.mark.parametrize(("seconds", "text"), [(0.00042, "0.42"), (0.0481, "48.1"), (1.53, "1530")])
def test_milliseconds(seconds: float, text: str) -> None:
    assert milliseconds(seconds) == text


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_and_within(low: float, span: float) -> None:
    assume(span > abs(low) * 1e-6)  # beyond that, numbers of 53 bits have nothing left to be round with
    ticks = nice_ticks(low, low + span)
    assert len(ticks) <= 7
    assert all(low - span * 1e-6 <= tick <= low + span * (1 + 1e-6) for tick in ticks)


@given(st.floats(1e-6, 1e6), st.floats(1.0001, 1e6))
def test_logarithmic_ticks_are_few_and_within(low: float, factor: float) -> None:
    ticks = log_ticks(low, low * factor)
    assert 1 <= len(ticks) <= 14
    assert all(low * (1 - 1e-6) <= tick <= low * factor * (1 + 1e-6) for tick in ticks)


@given(st.lists(st.tuples(ANY, ANY), max_size=20), st.booleans(), st.booleans())
def test_any_points_give_a_plot_within_its_frame(points: list[tuple[float, float]], x_log: bool, y_log: bool) -> None:
    drawn = plot("t", Axis("x", log=x_log), Axis("y", log=y_log), [Line("l", points)])
    assert "nan" not in drawn
    assert "inf" not in drawn
    for x, y in re.findall(r'cx="([-\d.]+)" cy="([-\d.]+)"', drawn):
        assert 0 <= float(x) <= 640
        assert 0 <= float(y) <= 300
