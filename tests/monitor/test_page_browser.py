"""The page in a real browser: headless Chromium loads it, runs its script, and draws it."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import struct
import tempfile
import zlib
from pathlib import Path

import pytest

from services.monitor.page.chronicle import Notice
from services.monitor.page.view import Snapshot
from shared import subjects, wire
from tests.monitor.keeping import SOON, connected, nats_server, reporting
from tests.monitor.paging import LAYERS, Load, fleet, remember_an_hour, served, watching
from tests.running import die_with_parent, wait_until

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
BROWSER_SECONDS = 60
SCRIPT_MS = 3000
"""Virtual time in which the page's script may run: more than one of its rounds."""
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium")
HOSTILE = "<img src=x onerror=\"document.title='broken'\">"


async def browse(url: str, *options: str) -> str:
    """What Chromium prints for `url`."""
    assert BROWSER is not None
    with tempfile.TemporaryDirectory() as profile:
        process = await asyncio.create_subprocess_exec(
            BROWSER,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--disable-dev-shm-usage", f"--user-data-dir={profile}", f"--virtual-time-budget={SCRIPT_MS}"),
            *options,  # the later of two wins
            url,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={**os.environ, "HOME": profile},
            process_group=0,
            preexec_fn=die_with_parent,
        )
        try:
            async with asyncio.timeout(BROWSER_SECONDS):
                out, _ = await process.communicate()
        except TimeoutError:
            process.kill()
            await process.wait()
            raise AssertionError(f"Chromium did not finish within {BROWSER_SECONDS} s") from None
    return out.decode(errors="replace")


async def document(url: str, *options: str) -> str:
    """The document as it is after its script has run."""
    return await browse(url, "--dump-dom", *options)


def picture(path: Path) -> tuple[int, int, tuple[int, int, int]]:
    """(width, height, colour of the corner) of a PNG file with 8 bits a channel and no interlacing."""
    data = path.read_bytes()
    width, height, depth, kind = struct.unpack(">IIBB", data[16:26])
    assert (depth, kind in {2, 6}) == (8, True)
    parts, at = [], 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        if data[at + 4 : at + 8] == b"IDAT":
            parts.append(data[at + 8 : at + 8 + length])
        at += 12 + length
    # The first row's first pixel stands as it is, whatever the row's filter: its neighbours are zeros.
    raw = zlib.decompress(b"".join(parts))
    return width, height, (raw[1], raw[2], raw[3])


async def test_it_shows_a_fleet_and_its_script_keeps_it_fresh(tmp_path: Path) -> None:
    load = Load()
    statuses = fleet(load)
    async with (
        nats_server(tmp_path / "nats") as nats,
        connected(nats.url, "monitor-1") as bus,
        served(nats.url) as page,
    ):
        remember_an_hour(page)
        async with watching(page, bus), reporting(bus, statuses):
            load.work(5)
            alert = Notice(kind="high_latency", subject=HOSTILE, text=HOSTILE, time=1.0, state="firing")
            await bus.publish(subjects.event("alert"), wire.encode(alert))
            await wait_until(page.view.chronicle.firing, "the alert to be heard", SOON)

            html = await document(page.url)
            assert all(status.instance in html for status in statuses)
            assert html.count('class="strip"') == LAYERS
            assert len(re.findall(r'<path class="line c\d"', html)) >= 7
            assert "<title>OpenMoE monitor</title>" in html  # no markup from elsewhere has run
            assert "&lt;img src=x" in html
            assert '<body data-live="true">' in html  # the script has fetched and exchanged sections
            assert '<p id="lost" role="status" hidden=""></p>' in html

            shot = tmp_path / "page.png"
            await browse(page.url, f"--screenshot={shot}", "--window-size=1280,1600")
            assert picture(shot) == (1280, 1600, (255, 255, 255))
            await browse(page.url, f"--screenshot={shot}", "--blink-settings=preferredColorScheme=0")
            assert max(picture(shot)[2]) < 64


async def test_it_says_that_nats_is_gone_and_keeps_what_it_knew(tmp_path: Path) -> None:
    async with (
        nats_server(tmp_path / "nats") as nats,
        connected(nats.url, "monitor-1") as bus,
        served(nats.url) as page,
        watching(page, bus),
        reporting(bus, fleet(Load())),
    ):
        await wait_until(lambda: page.view.snapshot().report, "the fleet to be heard", SOON)
        await nats.kill()
        await wait_until(lambda: not page.view.snapshot().connected, "the loss to be noticed", SOON)
        html = await document(page.url)
    assert "does not answer since" in html
    assert '<main id="main" class="old">' in html
    assert "expert-3" in html


async def test_its_script_says_that_the_monitor_is_gone() -> None:
    asked = asyncio.Event()
    async with served() as page:
        snapshot = page.view.snapshot

        def noticed() -> Snapshot:
            if page.view._made is not None:  # the document has been given; this is its script
                asked.set()
            return snapshot()

        page.view.snapshot = noticed  # type: ignore[method-assign]
        looking = asyncio.create_task(document(page.url, f"--virtual-time-budget={20 * SCRIPT_MS}"))
        async with asyncio.timeout(BROWSER_SECONDS):
            await asked.wait()
    html = await looking
    assert "The monitor does not answer since" in html
    assert '<main id="main" class="old">' in html


async def test_it_says_that_there_is_no_data(tmp_path: Path) -> None:
    async with (
        nats_server(tmp_path / "nats") as nats,
        connected(nats.url, "monitor-1") as bus,
        served(nats.url) as page,
        watching(page, bus),
    ):
        await wait_until(lambda: page.view.snapshot().connected, "the connection", SOON)
        html = await document(page.url)
    assert "Nobody but the monitor reports yet" in html
    assert "Nothing has been measured yet." in html
