"""The monitor as a service: looks at the fleet each second, tells what is wrong. Never on a request's path."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any

import msgspec
import structlog

from services.monitor.alerting import Alerting
from services.monitor.findings import shards_missing
from services.monitor.keeper import Keeper
from services.monitor.page.server import serving
from services.monitor.page.view import View
from services.monitor.presence import Presence
from services.monitor.rebalancing import Rebalancer
from services.monitor.scaler import Scaler
from services.monitor.sight import Sight
from services.monitor.webhook import Webhook
from shared.bus import Bus, without_secrets
from shared.instrumentation import INSTANCES, SHARD_REPLICAS, SHARDS_MISSING
from shared.service import base_status, instance_name, listen, serve_metrics, service_context, until
from shared.settings import MonitorSettings
from shared.status import Fleet, State, Status, StatusReporter

log = structlog.get_logger()


class Monitor:
    """Shows on /metrics who is there and which shards are served."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def run(self, bus: Bus) -> None:
        while True:
            if bus.connected:  # else we hear nobody; that says nothing about them
                self._gauges(self._fleet.live())
            await asyncio.sleep(1)

    def _gauges(self, now: list[Status]) -> None:
        INSTANCES.clear()
        SHARD_REPLICAS.clear()
        SHARDS_MISSING.clear()
        for deployment, missing in shards_missing(now).items():
            SHARDS_MISSING.labels(deployment).set(len(missing))
        for status in now:
            INSTANCES.labels(status.service, status.state).inc()
            if status.service == "expert" and status.state == "ready":
                for shard in status.shards:
                    SHARD_REPLICAS.labels(status.deployment, str(shard)).inc()


async def _watch(parts: Mapping[str, Coroutine[Any, Any, None]]) -> None:
    """Run the monitor's parts, none waiting for another."""
    async with asyncio.TaskGroup() as group:
        for name, part in parts.items():
            group.create_task(part, name=name)


def _webhook(settings: MonitorSettings, page: str) -> Webhook | None:
    url = settings.alert_webhook_url
    if url is None:
        return None
    return Webhook(url, page, timeout_seconds=settings.alert_webhook_timeout_seconds)


async def serve(settings: MonitorSettings, shutdown: asyncio.Event) -> None:
    """Run the monitor until `shutdown`.

    Raises:
        StartError: a taken port, no NATS.

    """
    instance = instance_name(settings, "monitor")
    bus: Bus | None = None
    listener = listen("MONITOR_PORT", settings.host, settings.monitor_port)
    sight = Sight(instance)
    view = View(sight, without_secrets(settings.nats_url))
    address, stop_metrics = serve_metrics(settings, lambda: bus is not None and bus.connected)
    base = base_status(settings, "monitor", instance, address)
    reporter: StatusReporter | None = None
    keeper: Keeper | None = None
    state: State = "ready"

    def status() -> Status:
        stored = keeper is not None and keeper.stored
        known = reporter.with_usage(base) if reporter else base
        return msgspec.structs.replace(known, state=state, state_stored=stored, cores=1.0)

    try:
        # The page comes first, as it must say that NATS does not answer.
        async with serving(view, listener), service_context(settings, "monitor", instance, status) as service:
            reporter, bus = service.reporter, service.bus
            fleet = Fleet(settings.stale_seconds, tell=sight.tell)
            keeper = Keeper(service.bus, fleet, settings.stale_seconds)
            await fleet.watch(service.bus)
            await view.watch(service.bus)
            page = f"http://{settings.host}:{listener.getsockname()[1]}"
            log.info("monitor.ready", url=page, instance=instance)
            presence = Presence(service.bus, fleet)
            webhook = _webhook(settings, page)
            scaler = Scaler(settings, service.bus, sight)
            parts = {
                "gauges": Monitor(fleet).run(service.bus),
                "state": keeper.run(),
                "presence": presence.run(),
                "alerts": Alerting(settings, service.bus, sight, presence, keeper, webhook, scaler.readings).run(),
                "page": view.run(),
                "balance": Rebalancer(service.bus, sight, settings).run(),
                "scaling": scaler.run(),
            }
            if webhook is not None:
                parts["webhook"] = webhook.run()
            await until(shutdown, _watch(parts))
            state = "draining"
            await reporter.publish()
            await keeper.leave()
            if webhook is not None:
                await webhook.leave()
    finally:
        stop_metrics()
