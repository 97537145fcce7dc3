"""Server-sent events, as OpenAI streams them, and requests whose reader may leave."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import structlog
from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse

from services.gateway.failures import error_body
from shared.errors import MoeError

log = structlog.get_logger()
T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


def said_aloud(body: dict[str, Any] | None) -> dict[str, str]:
    """The headers that repeat what an answer says of itself, for those who look at nothing else."""
    return {"X-Moe-Degraded": "true"} if body and body.get("degraded") else {}


def answer(body: dict[str, Any]) -> JSONResponse:
    """A whole answer."""
    return JSONResponse(body, headers=said_aloud(body))


def event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def is_error_event(data: bytes) -> bool:
    """Whether `data`, which `stream` sent, is the event of an error."""
    return data.startswith(b'data: {"error":')


def stream(events: AsyncIterator[dict[str, Any]], first: dict[str, Any] | None) -> StreamingResponse:
    """`events` as they come, then `[DONE]`; an error after the first event becomes an event of its own."""

    async def body() -> AsyncIterator[bytes]:
        try:
            if first is not None:
                yield event(first)
            async for each in events:
                yield event(each)
        except MoeError as error:
            yield event(error_body(error))
        except Exception:  # the response has begun: the client gets a neutral sentence, the log the traceback
            log.exception("stream.failed")
            yield event(error_body(MoeError("internal_error", "internal error; see the gateway's log")))
        finally:
            await events.aclose()  # type: ignore[attr-defined]
        yield DONE

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **said_aloud(first)}
    return StreamingResponse(body(), media_type="text/event-stream", headers=headers)


async def begin(request: Request, events: AsyncIterator[dict[str, Any]]) -> StreamingResponse:
    """Wait for the first event, so that an early error still gets its HTTP status, then stream."""

    async def next_event() -> dict[str, Any] | None:
        return await anext(events, None)

    try:
        first = await while_connected(request, next_event())
    except BaseException:
        await events.aclose()  # type: ignore[attr-defined]
        raise
    return stream(events, first)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`; cancel it when the client goes away.

    Raises:
        MoeError: `cancelled`, if the client went away; otherwise what `work` raises.

    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.create_task(work, name="work")
    watch = asyncio.create_task(gone(), name="disconnect")
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise MoeError("cancelled", "the client went away")
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(task, watch, return_exceptions=True)
