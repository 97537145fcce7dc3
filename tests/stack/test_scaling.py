"""A stack that grows and shrinks: by hand, and by itself under a load that rises and falls. No request fails."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from nats.aio.msg import Msg

from services.monitor.messages import ScalingEvent
from shared import subjects, wire
from tests.running import Stack, Watcher, running_stack, wait_until, watching
from tests.stack.test_commands import openmoe

PAIR_MS = "4"
"""Workers sleep so long for each token and expert: how much they can do is theirs, whatever cores there are."""
SHORT = {
    "SIMULATED_PAIR_MS": PAIR_MS,
    "SCALING_COOLDOWN_SECONDS": "5",
    "SCALING_WINDOW_SECONDS": "6",
    "SCALING_LOOK_SECONDS": "4",
    "SCALING_LATENCY_MS": "2000",
    "MAX_WORKERS": "4",
    "MAX_ROUTERS": "1",
    "MAX_QUEUE_SECONDS": "30",
    "ENABLE_CACHING": "false",
}


def nats_of(stack: Stack) -> str:
    """The server that the stack has started, as it says."""
    found = re.findall(r"^nats-server (nats://\S+)$", stack.log.read_text(), re.MULTILINE)
    return str(found[0])


class Load:
    """Completions at a rate that may change, each sent when its time has come, whatever became of the others."""

    def __init__(self, url: str) -> None:
        self.rate = 0.0
        self.statuses: list[int] = []
        self._client = httpx.AsyncClient(base_url=url, timeout=60, trust_env=False)
        self._under_way: set[asyncio.Task[None]] = set()

    async def _ask(self, number: int) -> None:
        body = {"prompt": f"{number} x", "max_tokens": 6, "ignore_eos": True}
        try:
            self.statuses.append((await self._client.post("/v1/completions", json=body)).status_code)
        except httpx.HTTPError:
            self.statuses.append(0)

    async def _send(self) -> None:
        due, number = time.monotonic(), 0
        while True:
            if self.rate <= 0 or time.monotonic() < due:
                await asyncio.sleep(0.01)
                due = max(due, time.monotonic()) if self.rate <= 0 else due
                continue
            number += 1
            due = max(due + 1 / self.rate, time.monotonic() - 1)
            task = asyncio.create_task(self._ask(number), name=f"ask:{number}")
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Send while the block lasts; then wait for the answers."""
        sender = asyncio.create_task(self._send(), name="load")
        try:
            yield
            self.rate = 0.0
            await wait_until(lambda: not self._under_way, "all answers")
        finally:
            tasks = [sender, *self._under_way]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._client.aclose()


class Seen:
    """What is said about scaling, and how many workers are ready."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self.events: list[ScalingEvent] = []

    async def listen(self) -> None:
        await self._watcher.bus.watch(subjects.event("scaling"), self._on_event)
        await self._watcher.bus.flush()

    def _on_event(self, message: Msg) -> None:
        self.events.append(wire.decode(ScalingEvent, message.data))

    def ready(self, service: str = "expert") -> int:
        return sum(s.state == "ready" for s in self._watcher.fleet.live(service))

    def changes(self) -> list[tuple[str, int, int]]:
        return [
            (e.kind, e.current, e.desired) for e in self.events if e.kind != "scaling_held" and e.subject == "expert"
        ]

    def story(self) -> str:
        """For the message of an assertion."""
        return "\n".join(f"{e.kind} {e.current}->{e.desired} {e.text} | {e.outcome}" for e in self.events)


@contextlib.asynccontextmanager
async def scaled_stack(folder: Path, **settings: str) -> AsyncIterator[tuple[Stack, Seen, str]]:
    settings = {"SCALING_EXECUTOR": "", **settings}
    async with running_stack(folder, "--experts", "2", "--data-dir", str(folder / "data"), **settings) as stack:
        nats_url = nats_of(stack)
        async with watching(nats_url) as watcher:
            seen = Seen(watcher)
            await seen.listen()
            await wait_until(lambda: seen.ready() == 2, "two workers to be seen")
            yield stack, seen, nats_url


async def test_an_operator_scales_up_and_down_under_load(tmp_path: Path) -> None:
    async with scaled_stack(tmp_path, MAX_WORKERS="4", MAX_ROUTERS="2", ENABLE_CACHING="false") as (
        stack,
        seen,
        nats_url,
    ):
        load = Load(stack.url)
        async with load.running():
            load.rate = 10.0
            code, out, err = await openmoe("scale", "expert=4", "router=2", NATS_URL=nats_url)
            assert code == 0, err
            assert "expert=4" in out
            assert "router=2" in out
            await wait_until(lambda: (seen.ready(), seen.ready("router")) == (4, 2), f"four workers; {out}")
            async with httpx.AsyncClient(base_url=stack.url, timeout=60, trust_env=False) as client:
                answer = await client.post("/admin/scale", json={"expert": 2, "router": 1})
            assert answer.status_code == 200, answer.text
            assert answer.json()["counts"] == {"expert": 2, "router": 1}
            await wait_until(lambda: (seen.ready(), seen.ready("router")) == (2, 1), f"two workers; {answer.text}")
        assert load.statuses
        assert set(load.statuses) == {200}
        assert [(e.subject, e.by_hand, e.current, e.desired) for e in seen.events if e.by_hand] == [
            ("expert", True, 2, 4), ("router", True, 1, 2), ("expert", True, 4, 2), ("router", True, 2, 1),
        ]  # fmt: skip
        code, out, _ = await openmoe("audit", "--json", NATS_URL=nats_url)
        assert code == 0
        records = [r for r in json.loads(out)["records"] if r["action"] == "scaled"]
        assert len(records) == 4


async def test_what_cannot_be_done_is_refused_with_the_reason(tmp_path: Path) -> None:
    async with scaled_stack(tmp_path, MAX_WORKERS="4") as (stack, seen, nats_url):
        code, out, err = await openmoe("scale", "expert=9", NATS_URL=nats_url)
        assert (code, out) == (1, "")
        assert "2 to 4" in err
        code, _, err = await openmoe("scale", "monitor=2", NATS_URL=nats_url)
        assert code == 2
        assert "expert=N" in err
        async with httpx.AsyncClient(base_url=stack.url, timeout=60, trust_env=False) as client:
            assert (await client.post("/admin/scale", json={"expert": 9})).status_code == 400
            assert (await client.post("/admin/scale", json={})).status_code == 400
            assert (await client.post("/admin/scale", content=b'{"expert": 3}')).status_code == 400
        assert seen.ready() == 2
        assert [e for e in seen.events if e.kind != "scaling_held"] == []


@pytest.mark.timeout(240)
async def test_a_rising_and_falling_load_is_followed_by_itself(tmp_path: Path) -> None:
    async with scaled_stack(tmp_path, **SHORT) as (stack, seen, _):
        load = Load(stack.url)
        async with load.running():
            load.rate = 1.0
            await wait_until(lambda: len(load.statuses) >= 3, "the first answers")
            load.rate = 9.0
            await wait_until(lambda: seen.ready() > 2, f"more workers\n{seen.story()}", 60)
            await wait_until(lambda: len(load.statuses) >= 60, "answers under load", 60)
            load.rate = 0.5
            await wait_until(lambda: seen.ready() == 2, f"two workers again\n{seen.story()}", 90)
        assert set(load.statuses) == {200}, load.statuses
        changes = seen.changes()
        assert {kind for kind, _, _ in changes} == {"scale_up", "scale_down"}, seen.story()
        assert (changes[0][1], changes[-1][2]) == (2, 2)
        for event in seen.events:
            assert event.text
            assert len(event.metrics) == 4
            assert event.winner in event.text
            assert event.outcome or event.kind == "scaling_held"
        log = stack.log.read_text()
        assert all(f"{c[1]} experts become {c[2]}" in log for c in changes)


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_a_square_wave_inside_the_cooldown_makes_no_flapping(tmp_path: Path) -> None:
    async with scaled_stack(tmp_path, **{**SHORT, "SCALING_COOLDOWN_SECONDS": "8"}) as (stack, seen, _):
        load = Load(stack.url)
        async with load.running():
            begin = time.monotonic()
            while time.monotonic() - begin < 36:
                load.rate = 9.0 if int(time.monotonic() - begin) // 3 % 2 == 0 else 0.2
                await asyncio.sleep(0.1)
            kinds = [kind for kind, _, _ in seen.changes()]
        assert set(load.statuses) == {200}, load.statuses
        assert "scale_down" not in kinds, seen.story()
