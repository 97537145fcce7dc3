"""Notifications as Alertmanager's webhook JSON, and their way to a real HTTP server that fails, is slow, or is away."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from structlog.testing import capture_logs

from services.monitor.alertmanager import group_key, webhook_json, when
from services.monitor.alerts import Notification
from services.monitor.messages import OpenAlert
from services.monitor.webhook import MAX_GROUPS, MAX_TRIES, Webhook, merged
from services.nats_server import free_port
from tests.monitor.receiving import SECRET, Receiver, receiving
from tests.running import wait_until

NOW = 1_767_225_600.25
SOON = 20.0
OWN_URL = "http://10.0.0.7:9100"


def alert(subject: str = "d/0", **more: Any) -> OpenAlert:
    facts = {
        "kind": "shard_without_replica",
        "subject": subject,
        "text": f"no worker serves {subject}",
        "service": "expert",
        "deployment": "d",
        "severity": "critical",
        "action": "takeover",
        "advice": "Start workers.",
        "value": 0.0,
        "threshold": 1.0,
        "started": NOW - 60,
        **more,
    }
    return OpenAlert(**facts)


def notification(*firing: str, resolved: tuple[str, ...] = (), deployment: str = "d") -> Notification:
    return Notification(
        ("shard_without_replica", deployment, "expert"),
        tuple(alert(s, deployment=deployment) for s in firing),
        tuple(alert(s, deployment=deployment, text=f"{s} is served") for s in resolved),
        NOW,
    )


# -- the JSON --------------------------------------------------------------------------------------------------------


def test_the_json_is_alertmanagers_version_4() -> None:
    body = json.loads(json.dumps(webhook_json(notification("d/0", resolved=("d/1",)), OWN_URL)))
    assert set(body) == {
        "version",
        "groupKey",
        "truncatedAlerts",
        "status",
        "receiver",
        "groupLabels",
        "commonLabels",
        "commonAnnotations",
        "externalURL",
        "alerts",
    }
    assert (body["version"], body["status"], body["receiver"], body["externalURL"]) == (
        "4",
        "firing",
        "openmoe",
        OWN_URL,
    )
    assert body["groupKey"] == '{}:{alertname="shard_without_replica", deployment="d", service="expert"}'
    assert body["groupLabels"] == {"alertname": "shard_without_replica", "deployment": "d", "service": "expert"}
    assert body["commonLabels"] == {**body["groupLabels"], "severity": "critical", "action": "takeover"}
    assert body["commonAnnotations"] == {"value": "0", "threshold": "1"}
    firing, resolved = body["alerts"]
    assert set(firing) == {"status", "labels", "annotations", "startsAt", "endsAt", "generatorURL", "fingerprint"}
    assert (firing["status"], firing["startsAt"], firing["endsAt"]) == (
        "firing",
        "2025-12-31T23:59:00.250Z",
        "0001-01-01T00:00:00Z",
    )
    assert firing["labels"]["subject"] == "d/0"
    assert firing["annotations"]["summary"] == "Experts that nobody serves: d/0"
    assert firing["annotations"]["description"] == "no worker serves d/0. Start workers."
    assert (resolved["status"], resolved["endsAt"]) == ("resolved", "2026-01-01T00:00:00.250Z")
    assert resolved["annotations"]["description"] == "d/1 is served"
    assert firing["fingerprint"] != resolved["fingerprint"]
    assert len(firing["fingerprint"]) == 16


def test_a_group_in_which_nothing_fires_is_resolved() -> None:
    assert webhook_json(notification(resolved=("d/1",)), OWN_URL)["status"] == "resolved"


def test_a_groups_key_is_quoted() -> None:
    assert group_key(("high_latency", 'd"}', "")) == '{}:{alertname="high_latency", deployment="d\\"}"}'


def test_times_are_rfc_3339() -> None:
    assert when(0) == "1970-01-01T00:00:00.000Z"


def test_a_later_notification_takes_the_place_of_one_that_waits_and_forgets_no_end() -> None:
    both = merged(notification("d/0", resolved=("d/1", "d/2")), notification("d/1", resolved=("d/0",)))
    assert [a.subject for a in both.firing] == ["d/1"]
    assert [a.subject for a in both.resolved] == ["d/2", "d/0"]


# -- the way ---------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def sending(url: str, timeout_seconds: float = 5) -> AsyncIterator[Webhook]:
    webhook = Webhook(url, OWN_URL, timeout_seconds=timeout_seconds, first_wait_seconds=0.02)
    task = asyncio.create_task(webhook.run(), name="webhook")
    try:
        yield webhook
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


async def delivered(webhook: Webhook, what: Callable[[], object]) -> None:
    await wait_until(lambda: what() and not webhook.waiting, "everything to be delivered", SOON)


async def test_a_notification_is_posted_as_json() -> None:
    async with receiving(Receiver(free_port())) as receiver, sending(receiver.url) as webhook:
        webhook.offer(notification("d/0"))
        await delivered(webhook, lambda: receiver.bodies)
    assert receiver.bodies == [webhook_json(notification("d/0"), OWN_URL)]
    assert receiver.heads[0].startswith(f"POST /hook/{SECRET} HTTP/1.1")
    assert "content-type: application/json" in receiver.heads[0].lower()


@pytest.mark.parametrize("first", [[500], [503, 429, 502], [60.0], [0.0, 408]], ids=["500", "busy", "slow", "cut"])
async def test_a_receiver_that_fails_is_tried_again_until_it_takes_it(first: list[int | float]) -> None:
    async with (
        receiving(Receiver(free_port(), list(first))) as receiver,
        sending(receiver.url, timeout_seconds=0.3) as webhook,
    ):
        webhook.offer(notification("d/0"))
        await delivered(webhook, lambda: len(receiver.bodies) > len(first))
        webhook.offer(notification(resolved=("d/0",)))
        await delivered(webhook, lambda: len(receiver.bodies) > len(first) + 1)
    assert receiver.statuses() == [*["firing"] * (len(first) + 1), "resolved"]


async def test_what_is_refused_for_good_is_not_tried_again() -> None:
    async with receiving(Receiver(free_port(), [400])) as receiver, sending(receiver.url) as webhook:
        webhook.offer(notification("d/0"))
        await delivered(webhook, lambda: receiver.bodies)
        webhook.offer(notification("e/0", deployment="e"))
        await delivered(webhook, lambda: len(receiver.bodies) > 1)
    assert [body["groupLabels"]["deployment"] for body in receiver.bodies] == ["d", "e"]


async def test_a_redirect_is_not_followed() -> None:
    async with receiving(Receiver(free_port(), [302])) as receiver, sending(receiver.url) as webhook:
        webhook.offer(notification("d/0"))
        await delivered(webhook, lambda: receiver.bodies)
    assert len(receiver.bodies) == 1


async def test_a_receiver_that_was_away_hears_how_things_are_and_not_how_they_came_to_be() -> None:
    receiver = Receiver(free_port())
    with capture_logs() as lines:
        async with sending(receiver.url) as webhook:
            webhook.offer(notification("d/0"))
            await wait_until(lambda: any(ln["event"] == "webhook.retried" for ln in lines), "a first failure", SOON)
            webhook.offer(notification("d/0", "d/1"))
            webhook.offer(notification("d/1", resolved=("d/0",)))
            assert webhook.waiting == 1
            async with receiving(receiver):
                await delivered(webhook, lambda: receiver.bodies)
    (body,) = receiver.bodies
    assert [(a["labels"]["subject"], a["status"]) for a in body["alerts"]] == [("d/1", "firing"), ("d/0", "resolved")]
    assert SECRET not in str(lines), "the URL may hold a token"


async def test_it_gives_up_after_so_many_tries_and_goes_on_with_the_next() -> None:
    async with receiving(Receiver(free_port(), [500] * MAX_TRIES)) as receiver:
        webhook = Webhook(receiver.url, OWN_URL, timeout_seconds=5, first_wait_seconds=0.0001)
        task = asyncio.create_task(webhook.run(), name="webhook")
        try:
            webhook.offer(notification("d/0"))
            await delivered(webhook, lambda: len(receiver.bodies) == MAX_TRIES)
            webhook.offer(notification("d/0"))
            await delivered(webhook, lambda: len(receiver.bodies) == MAX_TRIES + 1)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_who_goes_tries_once_more() -> None:
    async with receiving(Receiver(free_port(), [500])) as receiver:
        webhook = Webhook(receiver.url, OWN_URL, timeout_seconds=5)
        webhook.offer(notification("d/0"))
        webhook.offer(notification("e/0", deployment="e"))
        await webhook.leave()
    assert [body["groupLabels"]["deployment"] for body in receiver.bodies] == ["d", "e"]


async def test_who_goes_does_not_wait_for_a_receiver_that_is_slow() -> None:
    async with receiving(Receiver(free_port(), [60.0])) as receiver:
        webhook = Webhook(receiver.url, OWN_URL, timeout_seconds=30)
        webhook.offer(notification("d/0"))
        await webhook.leave()
        assert webhook.waiting == 1


async def test_a_url_that_httpx_cannot_use_ends_nothing() -> None:
    async with sending("http://xn--/") as webhook:
        with capture_logs() as lines:
            webhook.offer(notification("d/0"))
            await wait_until(lambda: any(ln["event"].startswith("webhook.") for ln in lines), "it to be said", SOON)


async def test_so_many_groups_wait_and_no_more() -> None:
    webhook = Webhook("http://127.0.0.1:1/", OWN_URL, timeout_seconds=1)
    for n in range(MAX_GROUPS + 10):
        webhook.offer(notification("d/0", deployment=f"d{n}"))
    assert webhook.waiting == MAX_GROUPS
