"""The life of a service process: settings, bus, ready, drain, exit. Only `run_process` touches signals."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import structlog
import uvloop
from prometheus_client import start_http_server

from shared import discovery
from shared.bus import Bus
from shared.errors import MoeError, StartError
from shared.instrumentation import REGISTRY
from shared.logs import configure_logs
from shared.settings import ServiceSettings, refuse
from shared.status import Status, StatusReporter

log = structlog.get_logger()


def instance_name(settings: ServiceSettings, service: str) -> str:
    """The instance's name on the bus: INSTANCE, or one that is unique among hosts and processes."""
    return (
        settings.instance
        or f"{service}-{socket.gethostname()[:20].replace('.', '-')}-{os.getpid()}-{os.urandom(2).hex()}"
    )


def base_status(settings: ServiceSettings, service: str, instance: str, address: str) -> Status:
    return Status(
        service=service,
        instance=instance,
        model=settings.model_name,
        pid=os.getpid(),
        host=socket.gethostname(),
        started=time.time(),
        address=address,
    )


def serve_metrics(settings: ServiceSettings) -> tuple[str, Callable[[], None]]:
    """Serve /metrics in a thread; returns its host:port and how to stop it.

    Raises:
        StartError: if the port is taken.

    """
    try:
        server, thread = start_http_server(settings.metrics_port, settings.host, registry=REGISTRY)
    except OSError as error:
        raise StartError(f"METRICS_PORT={settings.metrics_port} on {settings.host}: {error.strerror}") from None

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join(timeout=2)

    return f"{settings.host}:{server.server_port}", stop


class ServiceContext:
    """What every bus service has: its bus, its status reports and its discovery, opened and closed together."""

    def __init__(self, bus: Bus, reporter: StatusReporter) -> None:
        self.bus = bus
        self.reporter = reporter


@contextlib.asynccontextmanager
async def service_context(
    settings: ServiceSettings, service: str, instance: str, make_status: Callable[[], Status]
) -> Any:
    """Connect, report status each second and answer discovery; on leaving, close in reverse.

    Raises:
        StartError: if no NATS server answers.

    """
    try:
        bus = await Bus.connect(settings.nats_url, service, instance)
    except MoeError as error:
        raise StartError(f"NATS_URL={settings.nats_url}: {error.message}") from None
    reporter = StatusReporter(bus, make_status)
    task = asyncio.create_task(reporter.run(), name="status")
    try:
        await discovery.answer(bus)
        yield ServiceContext(bus, reporter)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await bus.abort()


def run_process(
    service: str, settings: ServiceSettings, main: Callable[[asyncio.Event], Coroutine[Any, Any, None]]
) -> None:
    """Run `main(shutdown)` until it returns; SIGTERM or SIGINT sets `shutdown`, a second one ends the process."""
    configure_logs(service, settings)

    async def supervised() -> None:
        shutdown = asyncio.Event()
        loop = asyncio.get_running_loop()

        def on_signal() -> None:
            if shutdown.is_set():
                os._exit(1)
            shutdown.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        await main(shutdown)

    try:
        uvloop.run(supervised())
    except StartError as error:
        refuse(error)
    except Exception:  # the last handler: one line for the user, the traceback for the log
        log.exception("service.crashed")
        sys.exit(1)


async def until(event: asyncio.Event, work: Awaitable[None]) -> None:
    """Await `work` until it ends or `event` is set; whatever `work` raises is raised here."""
    task = asyncio.ensure_future(work)
    stop = asyncio.create_task(event.wait(), name="shutdown")
    try:
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        for each in (task, stop):
            each.cancel()
        await asyncio.gather(task, stop, return_exceptions=True)
