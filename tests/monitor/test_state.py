"""What the monitor keeps: the pure changes, and the keeping with a real nats-server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from services.monitor.keeper import AUDIT_STREAM, BUCKET, EVENTS_STREAM, PLACEMENT, ROSTER, Keeper
from services.monitor.messages import Deployment, OpenAlert, Placement, Roster
from services.monitor.state import (
    LAST_SEEN_SECONDS,
    Look,
    deployment_after,
    deployments,
    placement_after,
    reason_of,
    roster_after,
)
from shared import subjects, wire
from shared.bus import Bus
from shared.errors import BadMessageError, MoeError
from shared.jetstream import ConflictError, JetStream, NoJetStreamError
from shared.status import Fleet, Status
from tests.monitor.keeping import (
    DEPLOYMENT,
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
from tests.running import wait_until

SETTLE_SECONDS = 0.5
NOW = 1767225600.5


def look(*live: Status, now: float = NOW, first: bool = False, alerts: tuple[OpenAlert, ...] | None = None) -> Look:
    return Look(live, now, "monitor-1", first=first, alerts=alerts)


# -- pure ------------------------------------------------------------------------------------------------------------


def test_a_placement_has_an_epoch_for_each_change_and_none_for_a_second_look() -> None:
    assert placement_after(None, DEPLOYMENT, look(router())) is None
    first = placement_after(None, DEPLOYMENT, look(router(), worker("a", 0, 1)))
    assert first
    assert (first.epoch, first.shards, first.reason) == (1, ((0, ("a",)), (1, ("a",))), "a serves 0, 1")
    assert placement_after(first, DEPLOYMENT, look(router(), worker("a", 1, 0))) is first
    second = placement_after(first, DEPLOYMENT, look(worker("a", 0), worker("b", 1), worker("c", state="loading")))
    assert second
    assert (second.epoch, second.reason) == (2, "b serves 1; a no longer serves 1")
    none = placement_after(second, DEPLOYMENT, look())
    assert none
    assert (none.epoch, none.shards) == (3, ())
    assert [r.action for r in none.unwritten] == ["placement_changed"]
    assert none.unwritten[0].text == "epoch 3: a no longer serves 0; b no longer serves 1"


def test_a_worker_of_another_deployment_has_no_part_in_it() -> None:
    other = Status(
        service="expert", instance="x", deployment="other-00000000", state="ready", num_shards=2, shards=(0,)
    )
    assert placement_after(None, DEPLOYMENT, look(other)) is None
    assert deployments(look(other, router())) == [DEPLOYMENT, "other-00000000"]


def test_an_epoch_is_above_all_that_may_have_been_told() -> None:
    lost = placement_after(None, DEPLOYMENT, look(worker("a", 0)), floor=7)
    assert lost
    assert lost.epoch == 8
    assert "lost" in lost.reason
    assert placement_after(lost, DEPLOYMENT, look(worker("a", 0)), floor=8) is lost


def test_a_reason_names_a_few_workers_and_counts_the_rest() -> None:
    after = ((0, tuple(f"w{n:02}" for n in range(30))),)
    assert reason_of((), after).endswith("w07 serves 0; and 22 more")


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.sets(st.integers(0, 3)), max_size=3), max_size=8))
def test_epochs_grow_by_one_with_each_change(looks: list[dict[str, set[int]]]) -> None:
    kept: Placement | None = None
    for serving in looks:
        workers = [worker(name, *shards) for name, shards in serving.items()]
        before, kept = kept, placement_after(kept, DEPLOYMENT, look(*workers))
        had, has = (before.shards if before else ()), (kept.shards if kept else ())
        assert (kept.epoch if kept else 0) == (before.epoch if before else 0) + (had != has)
        assert {(i, s) for s, instances in has for i in instances} == {(i, s) for i in serving for s in serving[i]}


def test_a_deployment_is_seen_once_a_minute() -> None:
    first = deployment_after(None, DEPLOYMENT, look(router(), worker("a", 0)))
    assert first == Deployment(model="demo", fingerprint="3f2a91bc", num_shards=2, first_seen=NOW, last_seen=NOW)
    assert deployment_after(first, DEPLOYMENT, look(router(), now=NOW + LAST_SEEN_SECONDS / 2)) is first
    later = deployment_after(first, DEPLOYMENT, look(router(), now=NOW + LAST_SEEN_SECONDS))
    assert later
    assert (later.first_seen, later.last_seen) == (NOW, NOW + LAST_SEEN_SECONDS)
    assert deployment_after(later, DEPLOYMENT, look()) is later
    assert deployment_after(None, DEPLOYMENT, look()) is None


def told(roster: Roster) -> list[tuple[str, str]]:
    return [(r.action, r.subject) for r in roster.unwritten]


def test_a_roster_says_who_came_and_went_and_how() -> None:
    first = roster_after(None, look(router(), worker("a", 0, 1), worker("b", 0)))
    assert told(first) == [("service_appeared", name) for name in ("a", "b", "router-1")]
    assert roster_after(first, look(router(), worker("b", 0), worker("a", 0, 1))) is first
    drains = roster_after(first, look(router(), worker("a", 0, 1), worker("b", state="draining")))
    assert told(drains) == []
    left = roster_after(drains, look(router(), worker("a", 0, 1)))
    assert told(left) == [("service_left", "b")]
    down = roster_after(left, look(worker("a", 0, 1)))
    assert told(down) == [("service_down", "router-1")]
    assert "silent" in down.unwritten[0].text
    gone = roster_after(left, look(worker("a", 0, 1), first=True))
    assert "while no monitor watched" in gone.unwritten[0].text


def test_a_roster_keeps_what_the_monitor_that_acts_has_told() -> None:
    alert = OpenAlert(
        kind="shard_without_replica", service="expert", subject=f"{DEPLOYMENT}/1", text="nobody serves it"
    )
    whole = roster_after(None, look(router(), worker("a", 0), alerts=()))
    opened = roster_after(whole, look(router(), worker("a", 0), alerts=(alert,)))
    assert opened.alerts == (alert,)
    assert told(opened) == [("alert_opened", f"{DEPLOYMENT}/1")]
    assert "nobody serves it" in opened.unwritten[0].text
    repeated = msgspec.structs.replace(alert, notified=NOW)
    again = roster_after(opened, look(router(), worker("a", 0), alerts=(repeated,)))
    assert (again.alerts, told(again)) == ((repeated,), [])
    closed = roster_after(again, look(router(), worker("a", 0), alerts=()))
    assert (closed.alerts, told(closed)) == ((), [("alert_closed", f"{DEPLOYMENT}/1")])


def test_a_monitor_that_does_not_act_leaves_the_rosters_alerts_as_they_are() -> None:
    alert = OpenAlert(kind="service_down", service="expert", subject="b")
    opened = roster_after(None, look(router(), alerts=(alert,)))
    assert roster_after(opened, look(router(), alerts=None)) is opened
    assert roster_after(opened, look(router(), worker("a", 0), alerts=None)).alerts == (alert,)


def test_a_roster_that_could_not_be_read_says_so_and_not_that_all_have_come() -> None:
    assert told(roster_after(None, look(router(), worker("a", 0, 1)), damaged=True)) == [("state_rebuilt", "roster")]


# -- the bucket and the streams --------------------------------------------------------------------------------------


@pytest_asyncio.fixture(loop_scope="session")
async def server(tmp_path: Path) -> AsyncIterator[Nats]:
    async with nats_server(tmp_path / "nats") as own:
        yield own


@pytest_asyncio.fixture(loop_scope="session")
async def bus(server: Nats) -> AsyncIterator[Bus]:
    async with connected(server.url) as own:
        await JetStream(own).bucket("none")  # nats-py's first request starts a task, which stays
        yield own


async def test_of_two_writes_on_one_revision_one_is_refused(bus: Bus) -> None:
    bucket = await JetStream(bus).make_bucket("b", history=2, max_bytes=2**20)
    assert await bucket.get("k") is None
    first = await bucket.put("k", b"one", last=0)
    with pytest.raises(ConflictError):
        await bucket.put("k", b"other", last=0)
    second = await bucket.put("k", b"two", last=first)
    assert second > first
    with pytest.raises(ConflictError):
        await bucket.put("k", b"late", last=first)
    entry = await bucket.get("k")
    assert entry
    assert (entry.value, entry.revision) == (b"two", second)
    assert await bucket.keys() == ["k"]


async def test_racing_writers_lose_no_write(bus: Bus) -> None:
    bucket = await JetStream(bus).make_bucket("race", history=1, max_bytes=2**20)

    async def add() -> None:
        for _ in range(10):
            while True:
                entry = await bucket.get("n")
                number = int(entry.value) if entry else 0
                with contextlib.suppress(ConflictError):
                    await bucket.put("n", str(number + 1).encode(), last=entry.revision if entry else 0)
                    break

    await asyncio.gather(*(add() for _ in range(4)))
    entry = await bucket.get("n")
    assert entry
    assert int(entry.value) == 40


async def test_a_record_sent_twice_is_kept_once(bus: Bus) -> None:
    stream = await JetStream(bus).make_stream("S", ["s.one"], max_age_seconds=3600, max_bytes=2**20, sync=True)
    assert await stream.append("s.one", b"a", record_id="1") == await stream.append("s.one", b"a", record_id="1")
    await stream.append("s.one", b"b", record_id="2")
    assert await stream.last(10) == [b"a", b"b"]
    assert await stream.last(1) == [b"b"]
    assert await JetStream(bus).stream("none").last(5) == []


async def test_a_stream_keeps_the_limits_of_its_operator_and_gets_new_subjects(bus: Bus) -> None:
    jetstream = JetStream(bus)
    await jetstream.make_stream("S", ["s.one"], max_age_seconds=100, max_bytes=2**20, sync=True)
    await jetstream.make_stream("S", ["s.one", "s.two"], max_age_seconds=200, max_bytes=2**21, sync=True)
    config = (await bus.jetstream(SOON).stream_info("S")).config
    assert (config.subjects, config.max_age, config.max_bytes) == (["s.one", "s.two"], 100, 2**20)


async def test_what_is_too_large_is_refused_before_it_is_sent(bus: Bus) -> None:
    bucket = await JetStream(bus).make_bucket("b", history=1, max_bytes=2**20)
    with pytest.raises(MoeError) as caught:
        await bucket.put("k", bytes(bus.max_payload + 1), last=0)
    assert caught.value.code == "payload_too_large"


async def test_without_a_connection_it_says_so_at_once(server: Nats, bus: Bus) -> None:
    bucket = await JetStream(bus).make_bucket("b", history=1, max_bytes=2**20)
    await server.kill()
    await wait_until(lambda: not bus.connected, "the connection to break", SOON)
    with pytest.raises(MoeError) as caught:
        await bucket.get("k")
    assert caught.value.code == "bus_unavailable"


async def test_replies_come_to_the_services_own_inbox(bus: Bus) -> None:
    """So that permissions can keep one service from reading what another one is told by JetStream."""
    seen = []
    await bus.watch(f"{subjects.inbox_prefix('test', 'test-1')}.>", lambda message: seen.append(message.subject))
    await bus.flush()
    await JetStream(bus).bucket("b")
    await wait_until(lambda: seen, "JetStream's answer on our own inbox", SOON)


# -- the keeper ------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def keeping(url: str, instance: str = "monitor-1") -> AsyncIterator[Keeper]:
    """A keeper at work, on a connection of its own."""
    async with connected(url, instance) as own:
        fleet = Fleet(SETTLE_SECONDS)
        await fleet.watch(own)
        keeper = Keeper(own, fleet, SETTLE_SECONDS)
        task = asyncio.create_task(keeper.run(), name=f"keeper {instance}")
        try:
            yield keeper
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def at_epoch(bus: Bus, number: int) -> Placement:
    async def there() -> bool:
        return await epoch(bus) >= number

    await wait_until(there, f"epoch {number}", SOON)
    kept = await placement(bus)
    assert kept
    assert kept.epoch == number
    return kept


async def test_what_is_seen_is_kept_and_told(server: Nats, bus: Bus) -> None:
    fleet = [router(), worker("a", 0), worker("b", 1)]
    async with reporting(bus, fleet), keeping(server.url) as keeper:
        assert (await at_epoch(bus, 1)).shards == ((0, ("a",)), (1, ("b",)))
        await wait_until(lambda: keeper.stored, "the keeper to say that it keeps", SOON)
        fleet[2] = worker("b", 0, 1)
        assert (await at_epoch(bus, 2)).reason == "b serves 0"
        fleet.pop(0)

        async def missed() -> bool:
            return ("service_down", "router-1") in await said(bus)

        await wait_until(missed, "the record of a router that fell silent", SOON)
    assert set(await said(bus)) == {
        *(("service_appeared", name) for name in ("a", "b", "router-1")),
        ("placement_changed", DEPLOYMENT),
        ("service_down", "router-1"),
    }
    everything = await records(bus)
    assert len({r.id for r in everything}) == len(everything) == 6


async def test_the_next_monitor_goes_on_where_the_last_one_stopped(server: Nats, bus: Bus) -> None:
    fleet = [router(), worker("a", 0), worker("b", 1)]
    async with reporting(bus, fleet):
        async with keeping(server.url):
            await at_epoch(bus, 1)
        before = await said(bus)
        fleet[2] = worker("c", 1)
        async with keeping(server.url, "monitor-2"):
            kept = await at_epoch(bus, 2)
            assert kept.reason == "c serves 1; b no longer serves 1"
    assert sorted((await said(bus))[len(before) :]) == [
        ("placement_changed", DEPLOYMENT),
        ("service_appeared", "c"),
        ("service_down", "b"),
    ]


async def test_two_monitors_keep_one_state_and_say_each_thing_once(server: Nats, bus: Bus) -> None:
    fleet = [router(), worker("a", 0), worker("b", 1)]
    async with reporting(bus, fleet), keeping(server.url), keeping(server.url, "monitor-2"):
        await at_epoch(bus, 1)
        for number in range(2, 6):
            fleet[2] = worker("b", 1) if number % 2 else worker("b", 0, 1)
            await at_epoch(bus, number)

        async def all_told() -> bool:
            return len([r for r in await records(bus) if r.action == "placement_changed"]) >= 5

        await wait_until(all_told, "a record of each epoch", SOON)
        everything = await records(bus)
    changes = [r.text.partition(":")[0] for r in everything if r.action == "placement_changed"]
    assert changes == [f"epoch {number}" for number in range(1, 6)]
    assert sorted(r.subject for r in everything if r.action == "service_appeared") == ["a", "b", "router-1"]


async def test_damaged_values_are_made_anew_and_epochs_do_not_go_back(server: Nats, bus: Bus) -> None:
    fleet = [router(), worker("a", 0), worker("b", 1)]
    async with reporting(bus, fleet):
        async with keeping(server.url):
            await at_epoch(bus, 1)
            fleet[2] = worker("b", 0, 1)
            await at_epoch(bus, 2)
        bucket = await JetStream(bus).bucket(BUCKET)
        assert bucket
        for key in await bucket.keys():
            entry = await bucket.get(key)
            assert entry
            await bucket.put(key, b"\xc1 no message", last=entry.revision)
        async with keeping(server.url, "monitor-2"):

            async def readable() -> bool:
                with contextlib.suppress(BadMessageError):
                    return await epoch(bus) > 0
                return False

            await wait_until(readable, "a placement that can be read", SOON)
            kept = await placement(bus)
            assert kept
            assert kept.epoch > 2
            assert kept.shards == ((0, ("a", "b")), (1, ("b",)))
            assert "lost" in kept.reason
    assert (await said(bus)).count(("state_rebuilt", ROSTER)) == 1
    entry = await bucket.get(ROSTER)
    assert entry
    assert [m.instance for m in wire.decode(Roster, entry.value).members] == ["a", "b", "router-1"]


async def test_a_bucket_that_was_deleted_is_made_again_with_higher_epochs(server: Nats, bus: Bus) -> None:
    fleet = [router(), worker("a", 0), worker("b", 1)]
    async with reporting(bus, fleet), keeping(server.url):
        await at_epoch(bus, 1)
        await bus.jetstream(SOON).delete_key_value(BUCKET)
        fleet[2] = worker("b", 0, 1)
        assert "lost" in (await at_epoch(bus, 2)).reason


async def test_records_of_a_monitor_that_died_before_it_told_them_are_told_by_the_next(server: Nats, bus: Bus) -> None:
    jetstream = JetStream(bus)
    bucket = await jetstream.make_bucket(BUCKET, history=5, max_bytes=2**20)
    kept = placement_after(None, DEPLOYMENT, look(worker("a", 0), worker("b", 1)))
    assert kept
    await bucket.put(PLACEMENT + DEPLOYMENT, wire.encode(kept), last=0)
    async with reporting(bus, [worker("a", 0), worker("b", 1)]), keeping(server.url, "monitor-2"):

        async def told_now() -> bool:
            return [r for r in await records(bus) if r.action == "placement_changed"] == list(kept.unwritten)

        await wait_until(told_now, "the record of the first monitor", SOON)
    assert await epoch(bus) == 1


async def test_without_jetstream_the_keeper_says_so_once_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with nats_server(tmp_path / "plain", jetstream=False) as server, connected(server.url) as bus:
        with pytest.raises(NoJetStreamError):
            await JetStream(bus).bucket(BUCKET)
        async with reporting(bus, [router()]), connected(server.url, "monitor-1") as own:
            keeper = Keeper(own, Fleet(SETTLE_SECONDS), SETTLE_SECONDS)
            for _ in range(3):
                await keeper._keep()
                assert not keeper.stored
            assert capsys.readouterr().out.count("state.not_stored") == 1


async def test_hostile_reports_make_no_keys(server: Nats, bus: Bus) -> None:
    hostile = Status(service="expert", instance="x", deployment="a.b >*\r\n", state="ready", num_shards=1, shards=(0,))
    async with reporting(bus, [router(), hostile, worker("a", 0), worker("b", 1)]), keeping(server.url):
        await at_epoch(bus, 1)
    bucket = await JetStream(bus).bucket(BUCKET)
    assert bucket
    assert await bucket.keys() == [f"deployments.{DEPLOYMENT}", f"placement.{DEPLOYMENT}", "roster"]


async def test_alerts_are_in_their_stream_and_audit_records_in_theirs_only(server: Nats, bus: Bus) -> None:
    async with keeping(server.url) as keeper:
        await wait_until(lambda: keeper.stored, "the streams to be there", SOON)
    await bus.publish(subjects.event("alert"), b"an alert")
    await bus.flush()
    events = JetStream(bus).stream(EVENTS_STREAM)
    assert await events.last(5) == [b"an alert"]
    audit = JetStream(bus).stream(AUDIT_STREAM)
    await audit.append(subjects.AUDIT, b"a record", record_id="1")
    assert await audit.last(1) == [b"a record"]
    assert await events.last(5) == [b"an alert"]
