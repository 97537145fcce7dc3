"""A fleet of real processes, each of which a test may kill, stop, cut off and start again, and a load that knows it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx
import psutil
from nats.aio.msg import Msg

from services.benchmark_http import Client
from services.chaos_load import Load, questions
from services.nats_server import binary, free_port, write_config
from shared import subjects, wire
from shared.bus import Bus
from shared.errors import BadMessageError
from shared.status import Status
from tests.faults.proxy import Proxy, proxying
from tests.running import Running, answers, start, start_service, wait_until

SHARDS = "2"
SERVICES = ("monitor", "expert-0", "expert-1", "router-0", "router-1", "gateway")
PROXIED = ("expert-0", "router-0", "gateway")
"""Whose way to NATS leads through a proxy."""
QUESTIONS, MAX_TOKENS = 8, 96
FLOWING_EVENTS = 4
ANSWER_SECONDS = 60.0


class FaultFleet:
    """nats-server and the services; two experts that both hold all shards, two routers."""

    def __init__(self, folder: Path, nats_port: int, monitoring_port: int, proxies: dict[str, Proxy]) -> None:
        self._folder = folder
        self._nats_port, self._monitoring_port = nats_port, monitoring_port
        self._config = write_config(folder, nats_port)
        self._http_port = free_port()
        self.proxies = proxies
        self.url = f"http://127.0.0.1:{self._http_port}"
        self.running: dict[str, Running] = {}
        self._seen: dict[str, tuple[float, Status]] = {}
        self.client = Client(self.url)
        self.load = Load(self.client, questions(7, QUESTIONS, MAX_TOKENS), ANSWER_SECONDS, 7)
        self._subscriptions = 0

    # -- processes ---------------------------------------------------------------------------------------------------

    @property
    def nats_url(self) -> str:
        return f"nats://127.0.0.1:{self._nats_port}"

    async def start_nats(self) -> None:
        """On the same port each time."""
        command = (binary(), "--config", str(self._config), "--http_port", str(self._monitoring_port))
        self.running["nats"] = await start(self._folder, "nats", *command)
        await wait_until(lambda: answers(self._nats_port), "nats-server to listen")

    async def start(self, name: str) -> None:
        """Start the service of that name; it may not be ready yet."""
        port = self.proxies[name].port if name in self.proxies else self._nats_port
        settings = {
            "INSTANCE": name,
            "NATS_URL": f"nats://127.0.0.1:{port}",
            "EXPERT_SHARDS": SHARDS,
            "METRICS_PORT": "0",
            "KV_CACHE_MB": "64",
            **({"SHARDS": "0,1"} if name.startswith("expert") else {}),
            **({"PORT": str(self._http_port)} if name == "gateway" else {}),
        }
        self.running[name] = await start_service(self._folder, name.partition("-")[0], **settings)

    def processes(self) -> set[psutil.Process]:
        """Those that run now."""
        return {psutil.Process(r.process.pid) for r in self.running.values() if r.process.returncode is None}

    def signal(self, name: str, number: signal.Signals) -> None:
        os.kill(self.running[name].process.pid, number)

    async def kill(self, name: str) -> None:
        await self.running[name].kill()

    async def restart(self, name: str) -> None:
        """Start it again and wait until it is ready."""
        if name == "nats":
            await self.start_nats()
            await self.all_ready()
            return
        await self.start(name)
        await self.ready(name)

    async def mend(self) -> None:
        """Undo every fault; cheap if there is none."""
        for proxy in self.proxies.values():
            proxy.delay = 0.0
            proxy.release()
            await proxy.listen()
        for name in ("nats", *SERVICES):
            running = self.running[name]
            if running.process.returncode is None:
                self.signal(name, signal.SIGCONT)
            elif name == "nats":
                await self.start_nats()
            else:
                await self.start(name)
        await self.all_ready()

    # -- what they say -----------------------------------------------------------------------------------------------

    def on_message(self, message: Msg) -> None:
        with contextlib.suppress(BadMessageError, ValueError):
            _, instance = subjects.parse_status(message.subject)
            self._seen[instance] = (time.monotonic(), wire.decode(Status, message.data))

    def status(self, name: str, since: float = 0.0) -> Status | None:
        """The last report of the process that now has this name, if it came after `since`."""
        at, status = self._seen.get(name, (0.0, None))
        return status if status is not None and at > since and status.pid == self.running[name].process.pid else None

    async def ready(self, *names: str, seconds: float = 60) -> None:
        """Wait until each says, from now on, that it is ready."""
        now = time.monotonic()

        def all_say() -> bool:
            for name in names:
                assert self.running[name].process.returncode is None, self.running[name].said()
            found = [self.status(name, now) for name in names]
            return all(status is not None and status.state == "ready" for status in found)

        await wait_until(all_say, f"{', '.join(names)} to be ready", seconds)

    async def all_ready(self) -> None:
        await self.ready(*(name for name in SERVICES if name != "gateway"))
        async with self.http() as client:

            async def healthy() -> bool:
                with contextlib.suppress(httpx.TransportError):
                    return (await client.get("/health")).status_code == 200
                return False

            await wait_until(healthy, "the gateway to be ready")

    def http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=ANSWER_SECONDS, trust_env=False)

    async def subscriptions(self) -> int:
        """Of all clients, as nats-server counts them."""
        async with httpx.AsyncClient(timeout=5, trust_env=False) as client:
            answer = await client.get(f"http://127.0.0.1:{self._monitoring_port}/subsz")
        return int(answer.json()["num_subscriptions"])

    async def learn(self) -> None:
        """Ask everything undisturbed, and count what a fleet at rest holds."""
        await self.load.learn()
        await self.at_rest()
        self._subscriptions = await self.subscriptions()

    async def at_rest(self) -> None:
        """Wait until nobody runs, waits or holds a KV block, and NATS has the subscriptions that it had at first."""
        now = time.monotonic()

        def idle() -> bool:
            found = [self.status(name, now) for name in ("router-0", "router-1", "gateway")]
            return all(s is not None and not (s.running or s.waiting or s.kv_usage) for s in found)

        await wait_until(idle, "routers and gateway to hold nothing", 20)

        async def as_before() -> bool:
            return not self._subscriptions or await self.subscriptions() == self._subscriptions

        await wait_until(as_before, f"NATS to have {self._subscriptions} subscriptions again", 20)

    # -- under load --------------------------------------------------------------------------------------------------

    async def under_load(self, fault: Callable[[], Awaitable[None]]) -> None:
        """Do `fault` while every kind of question is in mid-stream; no answer may fail or differ, nothing may be left.

        The load goes on until the fault is over.
        """
        over = False
        load = self.load
        load.asked.clear()
        load.restart()

        async def streams() -> None:
            await load.stream(QUESTIONS, lambda: over)

        task = asyncio.create_task(streams(), name="load")
        try:
            await wait_until(
                lambda: len(load.reading) == QUESTIONS and all(len(r.times) >= FLOWING_EVENTS for r in load.reading),
                "all streams to flow",
            )
            await fault()
            over = True
            await task
        finally:
            over = True
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert [a.failure for a in load.asked if a.failure] == []
        wrong = [f"{load.questions[a.question].name}: {a.wrong}" for a in load.asked if a.wrong]
        assert wrong == []
        assert len(load.asked) >= QUESTIONS
        await self.at_rest()


@contextlib.asynccontextmanager
async def fault_fleet(folder: Path) -> AsyncIterator[FaultFleet]:
    """Start it all; at the end every service must end with exit code 0."""
    async with contextlib.AsyncExitStack() as stack:
        nats_port = free_port()
        proxies = {name: await stack.enter_async_context(proxying(nats_port)) for name in PROXIED}
        fleet = FaultFleet(folder, nats_port, free_port(), proxies)
        bus: Bus | None = None
        try:
            await fleet.start_nats()
            bus = await Bus.connect(fleet.nats_url, "test", "faults")
            await bus.watch(subjects.STATUS_ALL, fleet.on_message)
            for name in SERVICES:
                await fleet.start(name)
            await fleet.all_ready()
            await fleet.learn()
            yield fleet
            for name in reversed(SERVICES):
                await fleet.running[name].stop()
        finally:
            fleet.client.close()
            if bus is not None:
                await bus.abort()
            await asyncio.gather(*(running.kill() for running in fleet.running.values()))
