"""The monitor's page, served for real: on real reports, without any, without NATS, and with hostile ones."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from services.local import Plan
from services.local import Stack as LocalStack
from services.monitor.keeper import AUDIT_STREAM, EVENTS_STREAM
from services.monitor.messages import AuditRecord, Event
from services.monitor.observations import History
from services.monitor.page.chronicle import Notice
from services.monitor.page.rendering import MAX_ROWS, page, sections
from services.monitor.page.server import FILES, FOLDER, HEADERS
from services.monitor.page.view import Snapshot
from services.monitor.report import expert_layers, fleet_report
from services.nats_server import free_port
from shared import subjects, wire
from shared.bus import Bus
from shared.errors import StartError
from shared.jetstream import JetStream
from shared.service import listen
from shared.settings import DEMO_MODEL
from shared.status import Status
from tests.monitor.keeping import DEPLOYMENT, SOON, Nats, connected, nats_server, reporting
from tests.monitor.paging import LAYERS, Load, Page, fleet, served, watching
from tests.running import answers, start_service, wait_until
from tests.start.starting import refusal

NOW = 1_767_225_600.0
USUAL_PORT = 8001
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


class Markup(HTMLParser):
    """The tags and attributes that a browser would see."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


@dataclass
class Scene:
    """A page that hears a fleet of reports on a nats-server of its own."""

    page: Page
    nats: Nats
    bus: Bus
    statuses: list[Status]
    http: httpx.AsyncClient

    async def text(self, path: str = "/") -> str:
        answer = await self.http.get(path)
        assert answer.status_code == 200
        return answer.text

    async def state(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(await self.text("/state.json"))
        return found

    async def shows(self, words: str) -> bool:
        return words in await self.text()


@contextlib.asynccontextmanager
async def scene(folder: Path, statuses: list[Status]) -> AsyncIterator[Scene]:
    async with (
        nats_server(folder / "nats") as nats,
        connected(nats.url, "monitor-1") as bus,
        served(nats.url) as shown,
        watching(shown, bus),
        reporting(bus, statuses),
        httpx.AsyncClient(base_url=shown.url, timeout=30, trust_env=False) as http,
    ):
        yield Scene(shown, nats, bus, statuses, http)


async def test_it_shows_the_fleet_its_shards_its_experts_and_its_figures(tmp_path: Path) -> None:
    load = Load()
    async with scene(tmp_path, fleet(load)) as s:
        await wait_until(lambda: s.shows("router-2"), "the fleet to be shown", SOON)
        load.work(10)
        s.statuses[:] = fleet(load)

        async def busy() -> bool:
            report = (await s.state())["report"]
            return bool(report["throughput"]["output_tokens_per_second"])

        await wait_until(busy, "the work to be counted", SOON)
        html, state = await s.text(), await s.state()
        for each in s.statuses:
            assert each.instance in html
        assert "Every shard is served, and no alert fires." in html
        assert html.count('class="strip"') == LAYERS
        assert [shard["ready"] for shard in state["report"]["deployments"][0]["shards"]] == [
            ["expert-1", "expert-3"],
            ["expert-2", "expert-3"],
        ]
        assert state["report"]["latency"]["gateway"]["time_to_first_token"]["count"] > 0
        assert state["acting"] == "monitor-1"
        assert (await s.http.get("/live.json")).json()["sections"].keys() >= {"banner", "fleet", "charts"}


async def test_without_any_data_everything_is_a_dash_and_nothing_is_zero(tmp_path: Path) -> None:
    async with scene(tmp_path, []) as s:
        await wait_until(lambda: s.shows("Nobody but the monitor reports yet"), "the page to say so", SOON)
        tiles = re.findall(r"<dd>([^<]*)", (await s.http.get("/live.json")).json()["sections"]["headline"])
        assert tiles == ["–"] * 7
        assert "Nothing has been measured yet." in await s.text()


async def test_a_shard_that_nobody_serves_is_told_at_the_top(tmp_path: Path) -> None:
    async with scene(tmp_path, [r for r in fleet(Load()) if r.instance not in {"expert-2", "expert-3"}]) as s:
        await wait_until(lambda: s.shows(f"No worker serves shard 1 of {DEPLOYMENT}"), "the shard to be missed", SOON)
        assert '<span class="badge bad">nobody</span>' in await s.text()


async def test_who_falls_silent_stays_named(tmp_path: Path) -> None:
    async with scene(tmp_path, fleet(Load())) as s:
        await wait_until(lambda: s.shows("expert-3"), "the worker to be shown", SOON)
        s.statuses[:] = [r for r in s.statuses if r.instance != "expert-3"]
        await wait_until(lambda: s.shows("1 instance has fallen silent."), "its silence to be told", SOON)
        assert '<span class="badge unknown">silent</span>' in await s.text()


async def test_without_nats_it_says_since_when_and_shows_the_last_that_was_heard(tmp_path: Path) -> None:
    async with scene(tmp_path, fleet(Load())) as s:
        await wait_until(lambda: s.shows("expert-3"), "the fleet to be shown", SOON)
        await s.nats.kill()
        await wait_until(lambda: s.shows("does not answer since"), "the banner", SOON)
        html = await s.text()
        assert "What follows is the last that was heard." in html
        assert '<main id="main" class="old">' in html
        assert "expert-3" in html
        assert "fallen silent" not in html
        assert not (await s.state())["connected"]
        await s.nats.start()
        await wait_until(lambda: s.shows('<main id="main" class="">'), "the connection to be back", SOON)
        assert "does not answer since" not in await s.text()


async def test_before_there_is_a_connection_it_answers_too() -> None:
    async with served() as shown, httpx.AsyncClient(base_url=shown.url, trust_env=False) as http:
        html = (await http.get("/")).text
        assert "NATS at nats://127.0.0.1:4222 does not answer since" in html
        assert (await http.get("/state.json")).json()["report"] is None


async def test_events_are_shown_with_their_reasons(tmp_path: Path) -> None:
    async with scene(tmp_path, fleet(Load())) as s:
        reason = "2 -> 3 workers: cpu_usage is 0.91"
        scaling = Event(kind="scale_up", subject="expert", text=reason, time=1_767_225_600.0)
        firing = Notice(kind="high_latency", subject="gateway", text="p95 is 812 ms", time=1.0, state="firing")
        await s.bus.publish(subjects.event("scaling"), wire.encode(scaling))
        await s.bus.publish(subjects.event("alert"), wire.encode(firing))
        await wait_until(lambda: s.shows("1 alert fires: high latency."), "the alert to be shown", SOON)
        html = await s.text()
        assert "p95 is 812 ms" in html
        assert "2 -&gt; 3 workers: cpu_usage is 0.91" in html
        over = msgspec.structs.replace(firing, state="resolved", time=2.0)
        await s.bus.publish(subjects.event("alert"), wire.encode(over))
        await wait_until(lambda: s.shows("No alert fires."), "the alert to be over", SOON)


async def test_what_was_told_before_it_started_is_read_from_the_streams_once(tmp_path: Path) -> None:
    async with nats_server(tmp_path / "nats") as nats, connected(nats.url, "monitor-1") as bus:
        jetstream = JetStream(bus)
        kept = {"max_age_seconds": 3600.0, "max_bytes": 2**20, "sync": False}
        await jetstream.make_stream(EVENTS_STREAM, [subjects.event("takeover")], **kept)  # type: ignore[arg-type]
        audit = await jetstream.make_stream(AUDIT_STREAM, [subjects.AUDIT], **kept)  # type: ignore[arg-type]
        took = Event(kind="takeover", subject="expert-3", text="took shard 1 over", time=1_767_225_600.0)
        await JetStream(bus).stream(EVENTS_STREAM).append(subjects.event("takeover"), wire.encode(took), record_id="1")
        moved = AuditRecord(id="2", time=1.0, actor="m", action="placement_changed", subject="d", text="epoch 2")
        await audit.append(subjects.AUDIT, wire.encode(moved), record_id="2")
        async with served(nats.url) as shown, watching(shown, bus):
            told = shown.view.chronicle
            await wait_until(lambda: len(told.decisions(10)) == 2, "the streams to be read", SOON)
            await bus.publish(subjects.event("takeover"), wire.encode(took))  # the same again
            later = msgspec.structs.replace(took, text="took shard 0 over")
            await bus.publish(subjects.event("takeover"), wire.encode(later))
            await wait_until(lambda: len(told.decisions(10)) == 3, "the new event", SOON)
            assert [e.text for e in told.decisions(10)].count("took shard 1 over") == 1


async def test_names_from_elsewhere_are_text_and_never_markup(tmp_path: Path) -> None:
    hostile = fleet(Load(), host=HOSTILE, address=HOSTILE)
    hostile = [msgspec.structs.replace(r, model=HOSTILE, deployment=HOSTILE if r.deployment else "") for r in hostile]
    async with scene(tmp_path, hostile) as s:
        event = Event(kind=HOSTILE, subject=HOSTILE, text=HOSTILE, time=1.0)
        alert = Notice(kind=HOSTILE, subject=HOSTILE, text=HOSTILE, time=1.0, state="firing", severity=HOSTILE)
        await s.bus.publish(subjects.event("scaling"), wire.encode(event))
        await s.bus.publish(subjects.event("alert"), wire.encode(alert))
        await wait_until(lambda: s.shows("1 alert fires: "), "the hostile alert", SOON)
        live = (await s.http.get("/live.json")).json()["sections"]
        markup = Markup()
        for html in (await s.text(), *live.values()):
            markup.feed(html)
        assert markup.tags.count("script") == 1
        assert not {"img", "iframe", "object"} & set(markup.tags)
        assert not [name for name, _ in markup.attributes if name.startswith("on") or name in {"style", "srcdoc"}]
        assert ("aria-label", f"Shards of {HOSTILE}") in markup.attributes
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in live["shards"]
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in live["decisions"]


async def test_every_answer_has_the_headers_and_nothing_comes_from_elsewhere() -> None:
    async with served() as shown, httpx.AsyncClient(base_url=shown.url, trust_env=False) as http:
        asked = [await http.get(path) for path in ("/", "/live.json", "/state.json", "/none", *FILES)]
        asked += [await http.head("/"), await http.post("/")]
        assert [a.status_code for a in asked] == [200, 200, 200, 404, *[200] * len(FILES), 200, 405]
        for answer in asked:
            assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS
        for text in [asked[0].text, *((FOLDER / name).read_text() for name in FILES)]:
            outside = re.findall(r"https?://[^\"')\s]+", text.replace(shown.url, ""))
            assert set(outside) <= {"http://www.w3.org/2000/svg"}
        assert not re.search(r"<style|\sstyle=|<script>|\son\w+=", asked[0].text)


def test_a_large_fleet_makes_no_endless_page() -> None:
    history = History(60)
    for n in range(3 * MAX_ROWS):
        worker = {"state": "ready", "deployment": "d", "shards": (n % 4,), "num_shards": 1000}
        history.observe(Status(service="expert", instance=f"expert-{n}", **worker), 0.0)  # type: ignore[arg-type]
    snapshot = Snapshot(
        time=NOW,
        monitor="monitor-1",
        acting=None,
        nats_url="nats://127.0.0.1:4222",
        connected=True,
        since=NOW,
        report=fleet_report(history.observation(0.0, NOW)),
        experts={"d": expert_layers(history.observation(0.0, NOW).of("router"))},
        experts_seconds=600.0,
        points=(),
        firing=(),
        alerts=(),
        decisions=(),
        presence=(),
    )
    made = sections(snapshot)
    assert made["fleet"].count("<tr") == MAX_ROWS + 1
    assert f"and {2 * MAX_ROWS} more" in made["fleet"]
    assert f"and {1000 - MAX_ROWS} more shards" in made["shards"]
    assert len(page(snapshot)) < 2**20


# -- the process -------------------------------------------------------------------------------------------------------


async def test_a_monitor_whose_nats_does_not_answer_serves_its_page_and_keeps_the_password_to_itself(
    tmp_path: Path,
) -> None:
    port, nowhere = free_port(), free_port()
    url = f"nats://somebody:very-secret@127.0.0.1:{nowhere}"
    monitor = await start_service(tmp_path, "monitor", NATS_URL=url, MONITOR_PORT=str(port))
    try:
        await wait_until(lambda: answers(port), "the page to be served", SOON)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
            for path in ("/", "/live.json", "/state.json"):
                text = (await http.get(path)).text
                assert "very-secret" not in text
                assert f"127.0.0.1:{nowhere}" in text
    finally:
        await monitor.kill()


async def test_a_taken_port_is_refused_in_one_line(tmp_path: Path) -> None:
    async with served() as shown:
        taken = shown.url.rpartition(":")[2]
        said = await refusal(tmp_path, "monitor", {"MONITOR_PORT": taken})
    assert f"MONITOR_PORT={taken} on HOST=127.0.0.1" in said


def test_a_stack_leaves_a_taken_usual_port_to_whoever_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MONITOR_PORT", raising=False)
    with contextlib.ExitStack() as held:
        with contextlib.suppress(StartError):  # somebody else may have it, which is as good
            held.enter_context(listen("MONITOR_PORT", "127.0.0.1", USUAL_PORT))
        assert LocalStack(Plan(DEMO_MODEL, port=free_port()), tmp_path).monitor_port != USUAL_PORT
        monkeypatch.setenv("MONITOR_PORT", str(USUAL_PORT))  # who asks for it is told that it is taken
        assert LocalStack(Plan(DEMO_MODEL, port=free_port()), tmp_path).monitor_port == USUAL_PORT
