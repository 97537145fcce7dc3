"""Around every request: its id, authentication, the body limit, draining, metrics. Plain ASGI: streams stay streams."""

from __future__ import annotations

import hmac
import time
import uuid

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.context import Context
from services.gateway.failures import error_response
from shared.errors import MoeError
from shared.instrumentation import HTTP_REQUESTS, HTTP_SECONDS
from shared.logs import request_id, safe_request_id
from shared.settings import MIB

log = structlog.get_logger()

OPEN_PATHS = {"/health"}
ALWAYS = {"/health", "/live", "/metrics", "/version", "/load", "/performance-report"}


def authorized(header: bytes, token: str) -> bool:
    """Whether an Authorization header carries `token`; compared in constant time."""
    scheme, _, given = header.partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), token.encode())


class Gatekeeper:
    """The one middleware."""

    def __init__(self, app: ASGIApp, context: Context, endpoints: frozenset[str]) -> None:
        self._app = app
        self._context = context
        self._endpoints = endpoints
        self._token = context.settings.api_auth_token
        self._max_body = context.settings.max_body_mb * MIB

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        identifier = safe_request_id(headers.get(b"x-request-id", b"").decode("latin-1")) or uuid.uuid4().hex
        request_id.set(identifier)
        start = time.perf_counter()
        path = scope["path"] if scope["path"] in self._endpoints else "other"
        status = 500
        received = 0

        async def counted_receive() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._max_body:
                    raise self._too_large()
            return message

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", identifier.encode())]
            await send(message)

        self._context.open_requests += 1
        try:
            self._admit(scope["path"], headers)
            await self._app(scope, counted_receive, watched_send)
        except MoeError as error:
            await error_response(error)(scope, receive, watched_send)
        finally:
            self._context.open_requests -= 1
            HTTP_REQUESTS.labels(path, scope["method"], str(status)).inc()
            seconds = time.perf_counter() - start
            HTTP_SECONDS.labels(path).observe(seconds)
            say = log.debug if scope["path"] in ALWAYS else log.info
            say("http.request", method=scope["method"], path=scope["path"], status=status, seconds=round(seconds, 4))

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
