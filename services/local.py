"""`openmoe up`: the whole stack on this machine, each service a real process, watched and restarted."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import httpx
import structlog
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn

from services.gateway.text import TextTokenizer
from services.nats_server import USUAL_PORT, answers_as, binary, free_port, write_config
from services.supervisor import supervise
from shared.bus import Bus
from shared.checkpoint import Checkpoint
from shared.checkpoint.names import check_experts
from shared.errors import MoeError, StartError
from shared.settings import ExpertSettings, GatewaySettings, MonitorSettings, RouterSettings, load
from shared.status import Fleet

NATS_ATTEMPTS = 3
NATS_SECONDS = 10.0
STOP_SECONDS = 15.0
FIRST_BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 10.0
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Plan:
    """What to start."""

    model: Path
    host: str = "127.0.0.1"
    port: int = 8000
    experts: int = 2
    routers: int = 1
    shards: int | None = None
    data_dir: Path | None = None
    supervised: bool = False
    """Whether there is somebody who takes requests to scale; see services/supervisor.py."""


def _die_with_parent() -> None:
    """In the child: end when the supervisor does, even if it is killed and can stop nobody."""
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class ChildRefusedError(Exception):
    """A service did not start; its own line has said why."""


@dataclass
class Child:
    """One process that is kept running."""

    name: str
    command: list[str]
    environment: dict[str, str]
    output: TextIO | None = None
    """Where its lines, and those about it, go; None: to standard error."""
    process: asyncio.subprocess.Process | None = None
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    stop_seconds: float = STOP_SECONDS
    """After SIGTERM."""
    told: bool = False
    """Whether it was sent SIGTERM; a second one would end its draining."""

    @property
    def service(self) -> str:
        """`expert`, of `expert-2`."""
        return self.name.rpartition("-")[0]

    @property
    def instance(self) -> str:
        return self.environment.get("INSTANCE", "")

    async def start(self) -> None:
        """Start it in a process group of its own: a terminal's Ctrl-C reaches the supervisor only."""
        self.process = await asyncio.create_subprocess_exec(
            *self.command,
            env=self.environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=self.output or sys.stderr,
            stderr=self.output,
            process_group=0,
            preexec_fn=_die_with_parent,
        )

    async def keep(self, is_up: Callable[[], bool]) -> None:
        """Restart it whenever it ends by itself, with backoff.

        Raises:
            ChildRefusedError: it refused to start (exit code 2) before all of the stack was up.

        """
        delay = FIRST_BACKOFF_SECONDS
        while True:
            started = time.monotonic()
            if self.process is None or self.process.returncode is not None:
                await self.start()
            assert self.process is not None  # noqa: S101 - start() made it
            code = await self.process.wait()
            if self.stopping.is_set():
                return
            if code == 2 and not is_up():
                raise ChildRefusedError
            if time.monotonic() - started > MAX_BACKOFF_SECONDS:
                delay = FIRST_BACKOFF_SECONDS
            (self.output or sys.stderr).write(f"{self.name} ended with code {code}; restarting in {delay:g} s\n")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self.stopping.wait()
            if self.stopping.is_set():
                return
            delay = min(delay * 2, MAX_BACKOFF_SECONDS)

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL after a while."""
        self.stopping.set()
        if self.process is None or self.process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            if not self.told:
                self.told = True
                self.process.terminate()
        try:
            async with asyncio.timeout(self.stop_seconds):
                await self.process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()


class Stack:
    """nats-server and the services of one `openmoe up`."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        *,
        settings: Mapping[str, str] | None = None,
        output: TextIO | None = None,
    ) -> None:
        """Check what will run.

        Args:
            plan: what to start.
            folder: for NATS' data.
            settings: environment variables of the services, over our own.
            output: where the processes' lines go; None: to standard error.

        Raises:
            StartError: a service would refuse.

        """
        # What would make a service refuse is found here first: one line, before anything runs.
        self.gateway = load(GatewaySettings)
        for kind in (RouterSettings, ExpertSettings):
            load(kind)
        self._monitor = load(MonitorSettings)
        checkpoint = Checkpoint.open(plan.model)
        check_experts(checkpoint.config, checkpoint.tensors)
        TextTokenizer.open(plan.model)
        self._plan = plan
        self._folder = folder
        self._settings = settings or {}
        self._output = output
        self._shards = plan.shards or min(plan.experts, checkpoint.config.num_experts)
        if self._shards > checkpoint.config.num_experts:
            raise StartError(f"--shards {self._shards}: the model has only {checkpoint.config.num_experts} experts")
        self.port = plan.port or free_port()
        self.url = f"http://{'127.0.0.1' if plan.host in ('0.0.0.0', '::') else plan.host}:{self.port}"
        # Its page is nothing that a stack should fail for: a usual port that another stack has is left to it.
        asked = "monitor_port" in self._monitor.model_fields_set and self._monitor.monitor_port
        self.monitor_port = asked or free_port(self._monitor.monitor_port)
        self.monitor_url = f"http://127.0.0.1:{self.monitor_port}"
        self.nats_url = os.environ.get("NATS_URL") or ""
        self.children: list[Child] = []
        self.supervisor = f"up-{os.urandom(4).hex()}"
        self._suffix = os.urandom(3).hex()
        self._number = 0

    async def start_nats(self) -> None:
        """Start nats-server, on another port if somebody takes the chosen one first; nothing if NATS_URL names one.

        Raises:
            StartError: it does not start.

        """
        if self.nats_url:
            return
        for attempt in range(NATS_ATTEMPTS):
            port, name = free_port(0 if attempt else USUAL_PORT), f"openmoe-{os.urandom(4).hex()}"
            config = write_config(self._folder, port, name)
            child = Child("nats-server", [binary(), "--config", str(config)], dict(os.environ), self._output)
            self.children = [child]
            await child.start()
            assert child.process is not None  # noqa: S101 - start() made it
            deadline = time.monotonic() + NATS_SECONDS
            while child.process.returncode is None and time.monotonic() < deadline:
                if await answers_as(port, name):
                    self.nats_url = f"nats://127.0.0.1:{port}"
                    return
                await asyncio.sleep(0.02)
            await child.stop()
        raise StartError("nats-server does not start; its own lines above say why")

    def prepare(self) -> None:
        """Decide on the services' processes."""
        names = ["monitor", *["expert"] * self._plan.experts, *["router"] * self._plan.routers, "gateway"]
        self.children += [self._child(service, self._plan.experts) for service in names]

    def _child(self, service: str, workers: int) -> Child:
        """The process of one more `service`, of so many workers that share the shards."""
        number, self._number = self._number, self._number + 1
        environment = {
            **os.environ,
            **(self._scaling() if service == "monitor" and self._plan.supervised else {}),
            "MODEL": str(self._plan.model),
            "NATS_URL": self.nats_url,
            "HOST": self._plan.host if service == "gateway" else "127.0.0.1",
            "PORT": str(self.port),
            "WORKERS": str(workers),
            "EXPERT_SHARDS": str(self._shards),
            "MONITOR_PORT": str(self.monitor_port),
            "METRICS_PORT": "0",
            "INSTANCE": f"{service}-{number}-{self._suffix}",
            **self._settings,
        }
        command = [sys.executable, "-m", f"services.{service}"]
        return Child(f"{service}-{number}", command, environment, self._output)

    def _scaling(self) -> dict[str, str]:
        """The monitor's settings: it scales this stack on this machine's cores, if the environment does not differ."""
        plan, cores = self._plan, len(os.sched_getaffinity(0))
        least = self._monitor.min_workers if os.environ.get("MIN_WORKERS") else min(2, plan.experts)
        ours = {
            "SCALING_EXECUTOR": "local",
            "MIN_WORKERS": str(least),
            "MAX_WORKERS": str(max(plan.experts, cores, least)),
            "MAX_ROUTERS": str(max(plan.routers, cores // 2, self._monitor.min_routers)),
        }
        ours = {name: value for name, value in ours.items() if not os.environ.get(name)}
        return {**ours, "SCALING_SUPERVISOR": self.supervisor}

    # -- more and fewer ----------------------------------------------------------------------------------------------

    def staying(self, service: str) -> list[Child]:
        """The processes of `service` that are not on their way out."""
        return [child for child in self.children if child.service == service and not child.stopping.is_set()]

    def add(self, service: str, count: int) -> list[Child]:
        """Make processes for `count` more of `service`; whoever keeps them starts them."""
        workers = len(self.staying("expert")) + (count if service == "expert" else 0)
        made = [self._child(service, workers) for _ in range(count)]
        self.children += made
        return made

    async def remove(self, child: Child, stop_seconds: float) -> None:
        """Have `child` drain and end; it is killed if it takes longer than `stop_seconds`."""
        child.stop_seconds = stop_seconds
        await child.stop()
        self.children.remove(child)

    async def stop(self) -> None:
        """In the order of a request's path, so that each finds what it still needs."""
        for child in reversed(self.children):
            child.stopping.set()
        for child in reversed(self.children):
            await child.stop()

    async def completes(self, client: httpx.AsyncClient) -> bool:
        """Whether a real completion comes back."""
        body = {"prompt": "def f(x):", "max_tokens": 1, "temperature": 0}
        try:
            if (await client.get("/health")).status_code != 200:
                return False
            return (await client.post("/v1/completions", json=body)).status_code == 200
        except httpx.HTTPError:
            return False


async def _show_loading(stack: Stack, done: asyncio.Event) -> None:
    """Progress bars of the weights, from the services' own reports, until `done`."""
    bus = await Bus.connect(stack.nats_url, "up", f"up-{os.getpid()}")
    fleet = Fleet()
    await fleet.watch(bus)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TextColumn("{task.fields[state]}"))
    bars: dict[str, TaskID] = {}
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            while not done.is_set():
                for status in [*fleet.live("expert"), *fleet.live("router")]:
                    if status.instance not in bars:
                        bars[status.instance] = progress.add_task(status.instance, total=None, state="")
                    total = status.total_bytes or None
                    bar = bars[status.instance]
                    progress.update(bar, total=total, completed=status.loaded_bytes, state=status.state)
                await asyncio.sleep(0.1)
    finally:
        await bus.abort()


async def completing(stack: Stack, *, show: bool = True) -> None:
    """Wait for the first real completion; `show`: with progress bars of the loading."""
    done = asyncio.Event()
    bars = asyncio.create_task(_show_loading(stack, done), name="progress") if show else None
    token = stack.gateway.api_auth_token
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        async with httpx.AsyncClient(base_url=stack.url, headers=headers, timeout=30, trust_env=False) as client:
            while not await stack.completes(client):
                await asyncio.sleep(0.1)
    finally:
        done.set()
        if bars is not None:
            with contextlib.suppress(MoeError):
                await bars


async def _announce(stack: Stack) -> None:
    await completing(stack)
    sys.stderr.write(f"nats-server {stack.nats_url}\n")
    sys.stderr.write(f"monitor {stack.monitor_url}\n")
    sys.stdout.write(f"ready {stack.url}\n")
    sys.stdout.flush()


@contextlib.asynccontextmanager
async def kept(stack: Stack, announce: Coroutine[Any, Any, None]) -> AsyncIterator[set[asyncio.Task[None]]]:
    """Run the stack while the block lasts; gives the tasks that keep it, and the one that runs `announce`.

    A keeper that ends has met a service that refuses to start: its result raises.
    """
    try:
        await stack.start_nats()
    except BaseException:
        announce.close()
        await stack.stop()
        raise
    stack.prepare()
    announcing = asyncio.create_task(announce, name="announce")
    keepers = [asyncio.create_task(c.keep(announcing.done), name=f"keep:{c.name}") for c in stack.children]
    try:
        yield {announcing, *keepers}
    finally:
        announcing.cancel()
        await stack.stop()
        for task in keepers:
            task.cancel()
        await asyncio.gather(*keepers, announcing, return_exceptions=True)


@contextlib.contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Make `folder`, and let no other `openmoe up` use it meanwhile.

    Raises:
        StartError: it cannot be made, or another one uses it: two nats-servers would write into the same files.

    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartError(f"--data-dir {folder}: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise StartError(f"--data-dir {folder}: another `openmoe up` uses it") from None
    try:
        yield
    finally:
        os.close(lock)


async def up(plan: Plan) -> None:
    """Run the stack until SIGINT or SIGTERM.

    Raises:
        StartError: a wrong model, a taken port, or a service that refuses to start.

    """
    shutdown = asyncio.Event()
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as folders:
        folder = plan.data_dir
        if folder is None:
            temporary = tempfile.TemporaryDirectory(prefix="openmoe-", ignore_cleanup_errors=True)
            folder = Path(folders.enter_context(temporary))
        folders.enter_context(_owned(folder))
        stack = Stack(plan, folder)

        def on_signal() -> None:
            if shutdown.is_set():
                os._exit(1)  # the children follow: they die with their parent
            shutdown.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal)
        structlog.configure(logger_factory=structlog.WriteLoggerFactory(sys.stderr))  # standard output is for `ready`
        async with kept(stack, _announce(stack)) as tasks:
            stop = asyncio.create_task(shutdown.wait(), name="shutdown")
            supervising = asyncio.create_task(supervise(stack), name="supervisor")
            try:
                waiting: set[asyncio.Task[Any]] = {*tasks, stop}
                while stop in waiting:
                    finished, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    for task in finished:
                        task.result()
            finally:
                for task in (supervising, stop):
                    task.cancel()
                await asyncio.gather(supervising, stop, return_exceptions=True)
