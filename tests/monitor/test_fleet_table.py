"""What `openmoe status` prints of a report."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from services.fleet_table import MAX_ROWS, Glance, as_json, layout
from services.monitor.messages import OpenAlert
from services.monitor.observations import History
from services.monitor.report import fleet_report
from tests.monitor.test_report import observed, status, still


def printed(glance: Glance) -> str:
    console = Console(width=200, force_terminal=False)
    with console.capture() as capture:
        console.print(layout(glance))
    return capture.get()


def test_it_shows_instances_shards_figures_and_advice() -> None:
    seen = observed(
        (status("gateway-1"), status("gateway-1", tokens_total=1230, requests_total=50, running=2)),
        still("router-1"),
        still("expert-1", shards=(0,)),
        silent=(status("expert-2", shards=(1,)),),
    )
    text = printed(Glance(fleet_report(seen), (OpenAlert(kind="shard_without_replica", subject="demo/1"),)))
    assert "123 tokens/s" in text
    assert "5.0 requests/s" in text
    assert "silent (was ready)" in text
    assert "nobody" in text
    assert "alert: shard_without_replica: demo/1" in text
    assert "advice: no worker serves shard 1" in text


@pytest.mark.parametrize(
    ("connected", "words"), [(True, "nobody reports: start services"), (False, "NATS does not answer")]
)
def test_without_data_it_says_what_to_do(connected: bool, words: str) -> None:
    seen = History(60).observation(0.0, 0.0, connected=connected)
    assert words in printed(Glance(fleet_report(seen), None))


@pytest.mark.parametrize(("alerts", "words"), [(None, "alerts: unknown"), ((), "alerts: none")])
def test_unknown_alerts_are_not_none(alerts: tuple[OpenAlert, ...] | None, words: str) -> None:
    assert words in printed(Glance(fleet_report(observed(still("gateway-1"))), alerts))


def test_figures_that_nobody_measured_are_dashes() -> None:
    text = printed(Glance(fleet_report(observed(still("router-1"))), ()))
    assert "– tokens/s" in text
    assert "first token p95 – ms" in text


def test_names_from_the_bus_are_text_and_no_markup() -> None:
    hostile = still("router-1", deployment="[bold red]x[/]", model="[link=file:///]")
    text = printed(Glance(fleet_report(observed(hostile)), (OpenAlert(kind="[blink]", subject="[/]"),)))
    assert "[bold red]x[/]" in text
    assert "alert: [blink]: [/]" in text


def test_a_terminal_obeys_no_name() -> None:
    hostile = still("router-1", deployment="d\x1b[2J\x07\u202e")
    text = printed(Glance(fleet_report(observed(hostile)), (OpenAlert(kind="\x1b]0;title\x07", subject="\n\r"),)))
    assert not {"\x1b", "\x07", "\r", "\u202e"} & set(text)


def test_a_large_fleet_is_cut_and_counted() -> None:
    history = History(60)
    for n in range(2 * MAX_ROWS):
        history.observe(status(f"expert-{n}"), 0.0)
    text = printed(Glance(fleet_report(history.observation(0.0, 0.0)), ()))
    assert f"and {MAX_ROWS} more" in text
    assert text.count("expert-") < 2 * MAX_ROWS


def test_the_json_has_all_of_it() -> None:
    glance = json.loads(as_json(Glance(fleet_report(observed(still("gateway-1"))), None)))
    assert glance["alerts"] is None
    assert [i["instance"] for i in glance["report"]["instances"]] == ["gateway-1"]
