"""Logs: one line per event; JSON in production and staging, readable in development; the request id on every line."""

from __future__ import annotations

import logging
import re
import sys
from contextvars import ContextVar

import structlog
from structlog.typing import EventDict, WrappedLogger

from shared.settings import ServiceSettings

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The request in hand; several, separated by commas, where one step serves many."""

_SAFE_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}\Z")


def safe_request_id(given: str) -> str:
    """`given` if it may stand in a header and a log line, else nothing: CR/LF would inject protocol."""
    return given if _SAFE_ID.match(given) else ""


def _add_request_id(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    current = request_id.get()
    if current:
        event.setdefault("request_id", current)
    return event


def configure_logs(service: str, settings: ServiceSettings) -> None:
    """Set structlog up for this process; the standard library's loggers (uvicorn's among them) say warnings only."""
    readable = settings.env == "development"
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()) if readable else structlog.processors.JSONRenderer()
    )

    def add_service(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event["service"] = service
        return event

    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            add_service,
            _add_request_id,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if readable else [structlog.processors.format_exc_info]),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[settings.log_level]),
        # One write per line: processes that share a terminal or a file must not run into each other's lines.
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(name)s: %(message)s")
    logging.getLogger("nats").setLevel(logging.ERROR)


def silence_logs() -> None:
    """For commands: what they print is their output, and an error is the one line that they end with."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
    )
    logging.getLogger("nats").setLevel(logging.CRITICAL)
