"""Around every request: its id, authentication, the body limit, draining, metrics. Plain ASGI: streams stay streams."""

from __future__ import annotations

import functools
import hmac
import itertools
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping

import structlog
from prometheus_client import Counter, Histogram
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.context import Context
from services.gateway.failures import error_response
from services.gateway.idempotency import HEADER as KEY
from shared.errors import MoeError
from shared.instrumentation import HTTP_REQUESTS, HTTP_SECONDS
from shared.logs import request_id, safe_request_id
from shared.settings import MIB

log = structlog.get_logger()

MAX_BODIES = 8
"""So many bodies of the largest size may be in memory at once, or as many smaller ones as that makes."""
OPEN_PATHS = {"/health"}
ALWAYS = {"/health", "/live", "/metrics", "/version", "/load", "/performance-report"}


def authorized(header: bytes, token: str) -> bool:
    """Whether an Authorization header carries `token`; compared in constant time."""
    scheme, _, given = header.partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), token.encode())


class Gatekeeper:
    """The one middleware."""

    def __init__(
        self,
        app: ASGIApp,
        context: Context,
        endpoints: frozenset[str],
        direct: Mapping[tuple[str, str], Callable[[Request], Awaitable[Response]]],
    ) -> None:
        """Stand before `app`.

        Args:
            app: the application.
            context: the gateway's.
            endpoints: paths that may be a metric's label.
            direct: by method and path, endpoints that are so short that the application's layers and its search for
                a route would be most of their time; they are called from here, and log what they do themselves.

        """
        self._app = app
        self._direct = {route: functools.partial(self._call, endpoint) for route, endpoint in direct.items()}
        self._context = context
        self._endpoints = endpoints
        self._token = context.settings.api_auth_token
        self._id_prefix = secrets.token_hex(8)
        self._ids = itertools.count(secrets.randbits(60))
        self._metrics: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self._max_body = context.settings.max_body_mb * MIB
        self._body_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id")
        identifier = (safe_request_id(given.decode("latin-1")) if given else "") or self._new_id()
        request_id.set(identifier)
        start = time.perf_counter()
        path = scope["path"] if scope["path"] in self._endpoints else "other"
        direct = self._direct.get((scope["method"], path))
        status = 500
        received = 0

        async def counted_receive() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                length = len(message.get("body", b""))
                received += length
                self._body_bytes += length
                if received > self._max_body:
                    raise self._too_large()
                if self._body_bytes > MAX_BODIES * self._max_body:
                    raise MoeError("overloaded", "too many large requests are under way; try again in a moment")
            return message

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", identifier.encode())]
            await send(message)

        self._context.open_connections += 1
        try:
            self._admit(scope["path"], headers)
            app = direct or self._app
            if KEY in headers and scope["method"] == "POST" and scope["path"].startswith("/v1/"):
                await self._context.idempotency.respond(app, scope, counted_receive, watched_send)
            else:
                await app(scope, counted_receive, watched_send)
        except ClientDisconnect:
            status = 499
        except MoeError as error:
            await error_response(error)(scope, receive, watched_send)
        finally:
            self._context.open_connections -= 1
            self._body_bytes -= received
            seconds = time.perf_counter() - start
            self._observe(path, scope["method"], status, seconds)
            quiet = path in ALWAYS or (direct is not None and status < 400)
            say = log.debug if quiet else log.info
            say("http.request", method=scope["method"], path=scope["path"], status=status, seconds=round(seconds, 4))

    async def _call(
        self, endpoint: Callable[[Request], Awaitable[Response]], scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Send what `endpoint` says; as the application has it, a neutral sentence for an error that nobody typed."""
        try:
            response = await endpoint(Request(scope, receive))
        except (MoeError, ClientDisconnect):
            raise
        except Exception:
            log.exception("request.failed")
            raise MoeError("internal_error", "internal error; see the gateway's log") from None
        await response(scope, receive, send)

    def _new_id(self) -> str:
        """32 hex digits that nobody else gives out: this gateway's own 16, and a count."""
        return f"{self._id_prefix}{next(self._ids):016x}"

    def _observe(self, path: str, method: str, status: int, seconds: float) -> None:
        """Count a request; a metric's child is looked up once."""
        key = (path, method, status)
        metrics = self._metrics.get(key)
        if metrics is None:
            metrics = HTTP_REQUESTS.labels(path, method, str(status)), HTTP_SECONDS.labels(path)
            self._metrics[key] = metrics
        metrics[0].inc()
        metrics[1].observe(seconds)

    def _admit(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self._token and path not in OPEN_PATHS and not authorized(headers.get(b"authorization", b""), self._token):
            raise MoeError("invalid_api_key", "send the API key as 'Authorization: Bearer <key>'")
        if self._context.draining and path not in ALWAYS:
            raise MoeError("draining", "the server is shutting down; try again in a moment")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._max_body:
            raise self._too_large()

    def _too_large(self) -> MoeError:
        return MoeError("payload_too_large", f"the body is larger than {self._max_body // MIB} MB (MAX_BODY_MB)")
