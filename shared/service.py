"""The life of a service process: settings, bus, ready, drain, exit. Only `run_process` touches signals."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from http.server import ThreadingHTTPServer
from typing import Any

import structlog
import uvloop
from prometheus_client import MetricsHandler

from shared import discovery
from shared.bus import Bus, without_secrets
from shared.errors import MoeError, StartError
from shared.instrumentation import REGISTRY, turn_off
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


def serve_metrics(settings: ServiceSettings, is_ready: Callable[[], bool]) -> tuple[str, Callable[[], None]]:
    """Serve /metrics, and /health for probes, in a thread; returns its host:port and how to stop it.

    Args:
        settings: the service's.
        is_ready: asked from that thread, so it may only read; /health is 503 while it is false.

    Raises:
        StartError: if the port is taken.

    """

    class Handler(MetricsHandler):
        registry = REGISTRY
        timeout = 5

        def do_GET(self) -> None:  # noqa: N802 - the standard library's name
            if self.path != "/health":
                super().do_GET()
                return
            ready = is_ready()
            body = json.dumps({"ready": ready}).encode()
            self.send_response(200 if ready else 503)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    try:
        server = ThreadingHTTPServer((settings.host, settings.metrics_port), Handler)
    except OSError as error:
        raise StartError(f"METRICS_PORT={settings.metrics_port} on {settings.host}: {error.strerror}") from None
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join(timeout=2)

    return f"{settings.host}:{server.server_port}", stop


def listen(name: str, host: str, port: int) -> socket.socket:
    """A listening socket; `name` is the setting that the port comes from.

    Raises:
        StartError: the port is taken or the address is not this machine's.

    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise StartError(f"{name}={port} on HOST={host}: {error.strerror}") from None


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
        raise StartError(f"NATS_URL={without_secrets(settings.nats_url)}: {error.message}") from None
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
    if settings.metrics == "off":
        turn_off()

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
