"""What operators change: how many workers and routers there are. Never on a request's path.

Behind the gatekeeper like every endpoint: where API_AUTH_TOKEN is set, which production demands, it must be sent.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from services.gateway.context import Context, parse
from services.gateway.openai_types import ScaleBody
from services.monitor.messages import ScaleReply, ScaleRequest
from services.monitor.sight import acting
from services.monitor.utilisation import Service
from shared import subjects, wire
from shared.errors import MoeError


async def scale(context: Context, counts: dict[Service, int]) -> ScaleReply:
    """Ask the monitor that acts to have `counts`.

    Raises:
        MoeError: `scaling_failed`, as no monitor is there or it cannot do it; `invalid_request`, out of its bounds.

    """
    monitor = acting(context.fleet.live("monitor"))
    if monitor is None:
        raise MoeError("scaling_failed", "no monitor is ready, and only a monitor scales; start one")
    request = ScaleRequest(counts=counts, reason="POST /admin/scale")
    subject = subjects.control("monitor", monitor)
    timeout = context.settings.timeout_seconds
    return wire.decode(ScaleReply, await context.bus.request(subject, wire.encode(request), timeout=timeout))


def routes(context: Context) -> APIRouter:
    """The endpoints, bound to their context."""
    router = APIRouter(tags=["operations"])

    @router.post("/admin/scale")
    async def post_scale(request: Request) -> dict[str, Any]:
        """Change how many expert workers and routers there are; it stands for a cooldown."""
        # A form of another site's page cannot be of this type, and a script there would have to ask first.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise MoeError("invalid_request", "send the body as Content-Type: application/json")
        body = await parse(request, ScaleBody)
        counts: dict[Service, int] = {}
        if body.expert is not None:
            counts["expert"] = body.expert
        if body.router is not None:
            counts["router"] = body.router
        reply = await scale(context, counts)
        return {"counts": reply.counts, "text": reply.text}

    return router
