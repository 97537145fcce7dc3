"""The monitor's state when the monitor, or NATS, is killed: acknowledged records stay, and epochs never go back."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from services.monitor.keeper import AUDIT_STREAM, BUCKET, HISTORY, STATE_BYTES
from shared import subjects
from shared.bus import Bus
from shared.errors import MoeError
from shared.jetstream import Bucket, JetStream, Stream
from shared.status import Status
from tests.monitor.keeping import (
    SOON,
    Nats,
    connected,
    epoch,
    nats_server,
    placement,
    records,
    reporting,
    router,
    said,
    worker,
)
from tests.running import Running, Stack, environment, running_stack, start, start_service, wait_until

pytestmark = pytest.mark.faults
STALE_SECONDS = "0.8"
WRITERS = 8
COMPLETION = {"prompt": "def f(x):", "max_tokens": 8, "temperature": 0}


@pytest_asyncio.fixture(loop_scope="session")
async def server(tmp_path: Path) -> AsyncIterator[Nats]:
    async with nats_server(tmp_path / "nats") as own:
        yield own


async def monitor(server: Nats, folder: Path, instance: str = "monitor-1") -> Running:
    settings = {"NATS_URL": server.url, "INSTANCE": instance, "METRICS_PORT": "0", "STALE_SECONDS": STALE_SECONDS}
    return await start_service(folder, "monitor", **settings)


async def reaches(bus: Bus, number: int) -> None:
    async def there() -> bool:
        try:
            return await epoch(bus) >= number
        except MoeError:  # NATS is not back yet
            return False

    await wait_until(there, f"epoch {number}", SOON)


async def every_epoch_is_told(bus: Bus) -> bool:
    """Whether each epoch so far has one record."""
    told = [r.text.partition(":")[0] for r in await records(bus) if r.action == "placement_changed"]
    return told == [f"epoch {number}" for number in range(1, await epoch(bus) + 1)]


async def test_records_acknowledged_up_to_the_kill_of_nats_are_there_after_it(server: Nats, tmp_path: Path) -> None:
    """SIGKILL with writes in flight, three times over on the same folder."""
    acknowledged: set[bytes] = set()
    for attempt in range(3):
        async with connected(server.url) as bus:
            jetstream = JetStream(bus)
            audit = await jetstream.make_stream(
                AUDIT_STREAM, [subjects.AUDIT], max_age_seconds=3600, max_bytes=2**24, sync=True
            )
            bucket = await jetstream.make_bucket(BUCKET, history=HISTORY, max_bytes=STATE_BYTES)
            revisions = dict.fromkeys(range(WRITERS), 0)

            async def write(
                number: int,
                attempt: int = attempt,
                audit: Stream = audit,
                bucket: Bucket = bucket,
                revisions: dict[int, int] = revisions,
            ) -> None:
                entry = await bucket.get(f"n.{number}")
                revisions[number] = entry.revision if entry else 0
                for count in range(100_000):
                    record = b"%d-%d-%d" % (attempt, number, count)
                    try:
                        await audit.append(subjects.AUDIT, record, record_id=record.decode())
                        acknowledged.add(record)
                        revisions[number] = await bucket.put(f"n.{number}", record, last=revisions[number])
                    except MoeError:
                        return

            before = len(acknowledged)
            writers = [asyncio.create_task(write(number), name=f"writer {number}") for number in range(WRITERS)]
            await wait_until(lambda before=before: len(acknowledged) > before + 300, "some records", SOON)  # type: ignore[misc]
            await server.kill()
            await asyncio.gather(*writers)
        await server.start()
        async with connected(server.url) as bus:
            jetstream = JetStream(bus)
            kept = await jetstream.stream(AUDIT_STREAM).last(100_000)
            assert acknowledged - set(kept) == set(), "acknowledged, and lost"
            assert len(kept) == len(set(kept))
            found = await jetstream.bucket(BUCKET)
            assert found
            for number, revision in revisions.items():
                entry = await found.get(f"n.{number}")
                assert entry
                assert entry.revision >= revision


async def test_a_monitor_killed_again_and_again_loses_no_epoch(server: Nats, tmp_path: Path) -> None:
    chance = random.Random(5)
    fleet: list[Status] = [router(), worker("a", 0), worker("b", 1)]
    async with connected(server.url) as bus, reporting(bus, fleet):
        highest = 0
        for life in range(4):
            running = await monitor(server, tmp_path, f"monitor-{life}")
            try:
                await reaches(bus, highest + 1)
                fleet[2] = worker("b", 0, 1) if life % 2 else worker("b", 1)
                await asyncio.sleep(chance.random())  # so that it dies at another step each time
            finally:
                await running.kill()
            assert await epoch(bus) > highest
            highest = await epoch(bus)
            fleet[1] = worker("a", 0) if life % 2 else worker("a", 0, 1)
        running = await monitor(server, tmp_path, "monitor-last")
        try:
            await reaches(bus, highest + 1)
            await wait_until(lambda: every_epoch_is_told(bus), "a record of every epoch", SOON)
            kept = await placement(bus)
            assert kept
            assert dict(kept.shards)[0][0] == "a"
        finally:
            await running.stop()
        assert "service_down" in {action for action, _ in await said(bus)}


async def test_nats_killed_under_the_monitor_loses_nothing(server: Nats, tmp_path: Path) -> None:
    fleet: list[Status] = [router(), worker("a", 0), worker("b", 1)]
    running = await monitor(server, tmp_path)
    try:
        async with connected(server.url) as bus, reporting(bus, fleet):
            highest = 0
            for life in range(3):
                await reaches(bus, highest + 1)
                told = await records(bus)
                highest = await epoch(bus)
                fleet[2] = worker("b", 1) if life % 2 else worker("b", 0, 1)
                await server.kill()
                await server.start()
                await wait_until(lambda: bus.connected, "the test's own connection", SOON)
                assert await epoch(bus) >= highest
                assert (await records(bus))[: len(told)] == told
            await reaches(bus, highest + 1)
            await wait_until(lambda: every_epoch_is_told(bus), "a record of every epoch", SOON)
            assert not [r for r in await records(bus) if r.action == "service_down"], "who was not heard is not down"
    finally:
        await running.stop()


async def test_a_monitor_that_stops_is_not_missed_by_the_next(server: Nats, tmp_path: Path) -> None:
    async with connected(server.url) as bus, reporting(bus, [router(), worker("a", 0), worker("b", 1)]):
        first = await monitor(server, tmp_path)
        try:
            await reaches(bus, 1)

            async def seen() -> bool:
                return ("service_appeared", "monitor-1") in await said(bus)

            await wait_until(seen, "the monitor to see itself", SOON)
        finally:
            await first.stop()
        second = await monitor(server, tmp_path, "monitor-2")
        try:

            async def left() -> bool:
                return ("service_left", "monitor-1") in await said(bus)

            await wait_until(left, "the second monitor to say how the first one went", SOON)
        finally:
            await second.stop()
        assert await epoch(bus) == 1
        assert ("service_down", "monitor-1") not in await said(bus)


async def text(http: httpx.AsyncClient) -> str:
    answer = await http.post("/v1/completions", json=COMPLETION)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


async def test_without_jetstream_requests_are_served_as_before(tmp_path: Path) -> None:
    async with (
        nats_server(tmp_path / "nats", jetstream=False) as server,
        running_stack(tmp_path, NATS_URL=server.url) as stack,
        httpx.AsyncClient(base_url=stack.url, timeout=60) as http,
    ):
        assert await text(http) == await text(http)
        out = await openmoe("status", NATS_URL=server.url)
        assert "ready, without" in out
        await wait_until(lambda: "state.not_stored" in stack.log.read_text(), "the monitor to say so", SOON)
        assert "Traceback" not in stack.log.read_text()


async def openmoe(*arguments: str, **settings: str) -> str:
    """What the command prints."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.cli", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**environment(**settings), "COLUMNS": "200"},
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()


async def kept_by(stack: Stack, above: int) -> tuple[int, list[str], str]:
    """(epoch, ids of the audit records, NATS_URL) by `openmoe audit`, once the epoch is above `above`."""
    line = next(ln for ln in stack.log.read_text().splitlines() if ln.startswith("nats-server nats://"))
    url = line.split()[1]
    found: list[tuple[int, list[str]]] = []

    async def placed() -> bool:
        kept = json.loads(await openmoe("audit", "--json", "--last", "1000", NATS_URL=url))
        epochs = [p["epoch"] for p in kept["placements"].values() if p["shards"]]
        found[:] = [(max(epochs, default=0), [r["id"] for r in kept["records"]])]
        return found[0][0] > above

    await wait_until(lambda: "state.stored" in stack.log.read_text(), "the monitor to keep state", SOON)
    await wait_until(placed, "a placement of this stack's workers", SOON)
    return *found[0], url


async def test_up_with_a_data_dir_goes_on_where_it_stopped(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    arguments = ("--data-dir", str(folder))
    async with running_stack(tmp_path, *arguments, STALE_SECONDS="2") as stack:
        epoch_before, ids_before, url = await kept_by(stack, 0)
        shown = await openmoe("audit", NATS_URL=url)
        assert "placements" in shown
        assert "service_appeared" in shown
        other = await start(tmp_path, "up", sys.executable, "-m", "services.cli", "up", "--port", "0", *arguments)
        try:
            assert await other.ended(60) == 2
        finally:
            await other.kill()
        assert "another `openmoe up` uses it" in other.said()
    async with running_stack(tmp_path, *arguments, STALE_SECONDS="2") as stack:
        epoch_after, ids_after, _ = await kept_by(stack, epoch_before)
    assert epoch_after > epoch_before
    assert ids_after[: len(ids_before)] == ids_before
