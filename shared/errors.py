"""Typed errors: each has a stable code, and one table maps codes to HTTP statuses.

On the bus an error travels as the headers `Nats-Service-Error` (text) and `Nats-Service-Error-Code` (the code below).
Over HTTP it becomes OpenAI's error object (https://platform.openai.com/docs/guides/error-codes).
"""

from __future__ import annotations

HTTP_STATUS: dict[str, int] = {
    "invalid_request": 400,
    "context_length_exceeded": 400,
    "invalid_api_key": 401,
    "not_found": 404,
    "model_not_found": 404,
    "method_not_allowed": 405,
    "payload_too_large": 413,
    "idempotency_mismatch": 422,
    "idempotency_not_kept": 422,
    "bad_message": 400,
    "wrong_shard": 503,
    "overloaded": 429,
    "queue_timeout": 503,
    "router_unavailable": 503,
    "shard_unavailable": 503,
    "bus_unavailable": 503,
    "draining": 503,
    "deadline_exceeded": 504,
    "chunk_lost": 503,
    "scaling_failed": 503,
    "cancelled": 499,
    "internal_error": 500,
}

RETRY_AFTER_SECONDS = 1, 60
"""The least and the most that a client is told."""


class MoeError(Exception):
    """Something a client may be told: a code of `HTTP_STATUS`, a sentence, and the parameter concerned, if any.

    `retry_after_seconds` is when the same request may succeed, where that is known; it does not travel on the bus.
    """

    def __init__(self, code: str, message: str, *, param: str | None = None, retry_after_seconds: float = 0) -> None:
        super().__init__(message)
        if code not in HTTP_STATUS:
            code, message = "internal_error", f"{code}: {message}"
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_seconds = retry_after_seconds

    @property
    def status(self) -> int:
        """The HTTP status for this error."""
        return HTTP_STATUS[self.code]

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed a moment later."""
        return self.status in {429, 503}


class BadMessageError(MoeError):
    """Bytes from the bus that are not a message of the expected type."""

    def __init__(self, message: str) -> None:
        super().__init__("bad_message", message)


class StartError(Exception):
    """A service cannot start; its text is the one line that the user reads."""


class CheckpointError(StartError):
    """The checkpoint is unsupported, incomplete or damaged; the text names the file, the tensor or the switch."""
