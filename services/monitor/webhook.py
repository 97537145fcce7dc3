"""Sends notifications to ALERT_WEBHOOK_URL, one after the other; of each group at most one waits.

What cannot be delivered yet waits, and what comes later of the same group takes its place: whoever was away hears how
things are, not how they came to be. Nothing is kept on disk; a monitor that dies takes along what it could not deliver.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import replace
from urllib.parse import urlsplit

import httpx
import structlog

from services.monitor.alertmanager import webhook_json
from services.monitor.alerts import Group, Notification, key_of
from shared.instrumentation import ALERT_NOTIFICATIONS

log = structlog.get_logger()

MAX_GROUPS = 256
MAX_TRIES = 12
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0
LEAVE_SECONDS = 2.0

for _result in ("delivered", "failed", "dropped"):  # from the start, so that a dashboard shows zero and not nothing
    ALERT_NOTIFICATIONS.labels(_result)


class Webhook:
    """Notifications on their way to one URL."""

    def __init__(
        self, url: str, own_url: str, *, timeout_seconds: float, first_wait_seconds: float = FIRST_WAIT_SECONDS
    ) -> None:
        """Send nothing before `run`.

        Args:
            url: where to; may hold a secret, so it is never logged.
            own_url: of this monitor, for people.
            timeout_seconds: of each try.
            first_wait_seconds: after the first failure; it doubles with each further one.

        """
        self._url, self._own_url = url, own_url
        self._timeout = timeout_seconds
        self._first_wait = first_wait_seconds
        self._waiting: dict[Group, Notification] = {}
        self._changed = asyncio.Event()
        self._host = urlsplit(url).hostname or ""

    @property
    def waiting(self) -> int:
        """Notifications that are not delivered yet."""
        return len(self._waiting)

    def offer(self, notification: Notification) -> None:
        """Have `notification` delivered; what waits of its group becomes part of it."""
        before = self._waiting.pop(notification.group, None)
        if before is not None:
            notification = merged(before, notification)
        elif len(self._waiting) >= MAX_GROUPS:
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            ALERT_NOTIFICATIONS.labels("dropped").inc()
            log.warning("webhook.dropped", host=self._host, alert=oldest[0], reason="too many wait")
        self._waiting[notification.group] = notification
        self._changed.set()

    async def run(self) -> None:
        """Deliver, until cancelled."""
        while True:
            try:
                await self._send()
            except Exception as error:  # a URL or a certificate that httpx cannot use must not end the watching
                log.error("webhook.broken", host=self._host, reason=type(error).__name__)  # noqa: TRY400 - it may quote the URL
            await asyncio.sleep(LONGEST_WAIT_SECONDS)

    async def leave(self) -> None:
        """Try once to deliver what waits, before this monitor goes."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_SECONDS), httpx.AsyncClient(follow_redirects=False) as client:
                for notification in list(self._waiting.values()):
                    reason, _ = await self._post(client, notification)
                    ALERT_NOTIFICATIONS.labels("failed" if reason else "delivered").inc()

    async def _send(self) -> None:
        async with httpx.AsyncClient(follow_redirects=False) as client:
            while True:
                await self._changed.wait()
                self._changed.clear()
                while self._waiting:
                    await self._deliver(client, next(iter(self._waiting)))

    async def _deliver(self, client: httpx.AsyncClient, group: Group) -> None:
        """Try until it is taken, refused for good, or MAX_TRIES are over; what comes meanwhile is what is sent next."""
        for tries in range(1, MAX_TRIES + 1):
            notification = self._waiting.get(group)
            if notification is None:  # dropped for others
                return
            reason, final = await self._post(client, notification)
            if not reason:
                ALERT_NOTIFICATIONS.labels("delivered").inc()
                self._done(notification)
                return
            if final or tries == MAX_TRIES:
                ALERT_NOTIFICATIONS.labels("failed").inc()
                log.warning("webhook.failed", host=self._host, alert=group[0], tries=tries, reason=reason)
                self._done(notification)
                return
            wait = min(LONGEST_WAIT_SECONDS, self._first_wait * 2 ** (tries - 1)) * random.uniform(0.75, 1.0)  # noqa: S311 - jitter
            log.info("webhook.retried", host=self._host, alert=group[0], reason=reason, in_seconds=round(wait, 2))
            await asyncio.sleep(wait)

    def _done(self, notification: Notification) -> None:
        """Forget it, unless a later one has taken its place."""
        if self._waiting.get(notification.group) is notification:
            del self._waiting[notification.group]

    async def _post(self, client: httpx.AsyncClient, notification: Notification) -> tuple[str, bool]:
        """One try: (what went wrong, or nothing; whether trying again is no use)."""
        body = webhook_json(notification, self._own_url)
        try:
            async with (
                asyncio.timeout(self._timeout),
                client.stream("POST", self._url, json=body, timeout=self._timeout) as answer,
            ):
                status = answer.status_code  # what it says beyond that nobody reads, however long
        except (TimeoutError, httpx.TimeoutException):
            return f"no answer within {self._timeout:g} s", False
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:  # its text may quote the URL
            return type(error).__name__, False
        if 200 <= status < 300:
            return "", False
        return f"HTTP {status}", status < 500 and status not in (408, 429)


def merged(before: Notification, after: Notification) -> Notification:
    """`after`, with what `before` says is over and what has not fired again since."""
    said = {key_of(each) for each in (*after.firing, *after.resolved)}
    left = tuple(each for each in before.resolved if key_of(each) not in said)
    return replace(after, resolved=(*left, *after.resolved))
