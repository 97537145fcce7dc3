"""Serves the page: HTML, what the live script exchanges, and all of it as JSON. Read-only: it takes no input."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import structlog
import uvicorn
from fastapi import FastAPI, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.monitor.page.rendering import page, sections
from services.monitor.page.view import Snapshot, View

log = structlog.get_logger()

MAX_CONNECTIONS = 64
IDLE_SECONDS = 5
STOP_SECONDS = 3.0
FOLDER = Path(__file__).parent
FILES = {"style.css": "text/css", "live.js": "text/javascript", "icon.svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class _Headers:
    """Puts HEADERS on every answer, those of errors too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._headers = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *self._headers]}
            await send(message)

        await self._app(scope, receive, answer)


def _file(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def file() -> Response:
        return Response(content, media_type=kind)

    return file


def build_app(view: View) -> ASGIApp:
    """The page's application."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    both = ["GET", "HEAD"]
    cached: tuple[Snapshot, bytes] | None = None

    @app.api_route("/", methods=both)
    async def whole() -> Response:
        return Response(page(view.snapshot()), media_type="text/html")

    @app.api_route("/live.json", methods=both)
    async def live() -> Response:
        """Sections of HTML, for the live script; made once for all who ask in the same second."""
        nonlocal cached
        snapshot = view.snapshot()
        if cached is None or cached[0] is not snapshot:
            body = {"connected": snapshot.connected, "sections": sections(snapshot)}
            cached = (snapshot, msgspec.json.encode(body))
        return Response(cached[1], media_type="application/json")

    @app.api_route("/state.json", methods=both)
    async def state() -> Response:
        return Response(msgspec.json.encode(view.snapshot()), media_type="application/json")

    for name, kind in FILES.items():
        app.add_api_route(f"/{name}", _file((FOLDER / name).read_bytes(), kind), methods=both)
    return _Headers(app)


@contextlib.asynccontextmanager
async def serving(view: View, listener: socket.socket) -> AsyncIterator[None]:
    """Serve the page on `listener` while the block lasts."""
    config = uvicorn.Config(
        build_app(view),
        loop="none",
        lifespan="off",
        ws="none",
        access_log=False,
        log_config=None,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    # Signals belong to the process, which sets `shutdown`; uvicorn must leave them alone.
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    task = asyncio.create_task(server._serve([listener]), name="page-http")  # noqa: SLF001 - serve() takes over signals
    try:
        yield
    finally:
        server.should_exit = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                await task
        listener.close()
