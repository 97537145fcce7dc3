"""Errors as clients see them: OpenAI's error object, one status per code, never a traceback."""

from __future__ import annotations

import math
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from shared.errors import HTTP_STATUS, RETRY_AFTER_SECONDS, MoeError
from shared.instrumentation import REJECTIONS

log = structlog.get_logger()

for _code in HTTP_STATUS:  # from the start, so that a dashboard shows zero and not nothing
    REJECTIONS.labels(_code)

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(error: MoeError) -> dict[str, Any]:
    kind = _TYPES.get(error.status) or ("server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def error_headers(error: MoeError) -> dict[str, str]:
    if error.status == 401:
        return {"WWW-Authenticate": "Bearer"}
    if not error.retryable:
        return {}
    least, most = RETRY_AFTER_SECONDS
    return {"Retry-After": str(math.ceil(min(max(error.retry_after_seconds, least), most)))}


def error_response(error: MoeError) -> JSONResponse:
    REJECTIONS.labels(error.code).inc()
    return JSONResponse(error_body(error), error.status, headers=error_headers(error))


def install(app: FastAPI) -> None:
    """Make `app` answer every failure in OpenAI's shape."""

    async def on_moe_error(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, MoeError)  # noqa: S101 - what it is registered for
        return error_response(error)

    async def on_http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)  # noqa: S101 - what it is registered for
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        text = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(error_body(MoeError(code, text)), error.status_code, headers=error.headers)

    async def on_any_error(_request: Request, error: Exception) -> JSONResponse:
        log.error("request.failed", exc_info=error)
        return error_response(MoeError("internal_error", "internal error; see the gateway's log"))

    app.add_exception_handler(MoeError, on_moe_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_any_error)
