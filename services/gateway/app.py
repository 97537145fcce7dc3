"""The HTTP application: its endpoints, put together."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.types import ASGIApp

from services.gateway import admin, chat, completions, failures, moe, operations
from services.gateway.context import Context
from services.gateway.idempotency import MAX_KEY_CHARACTERS
from services.gateway.middleware import Gatekeeper
from services.gateway.openai_types import (
    ChatRequest,
    CompletionRequest,
    DetokenizeBody,
    ForwardBody,
    RouteBody,
    ScaleBody,
    TokenizeBody,
)
from shared.discovery import VERSION

BODIES: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/moe/forward": ForwardBody,
    "/v1/moe/route": RouteBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
    "/admin/scale": ScaleBody,
}
IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "minLength": 1, "maxLength": MAX_KEY_CHARACTERS},
    "description": "Your name for this request, such as a UUID. The same request with it, sent again after a broken "
    "connection, gets the first one's answer instead of a second computation.",
}


def build_app(context: Context) -> ASGIApp:
    """The application of one gateway, behind its gatekeeper."""
    app = FastAPI(title="OpenMoE", version=VERSION)
    forward = moe.forward_endpoint(context)
    for router in (
        completions.routes(context),
        chat.routes(context),
        moe.routes(context, forward),
        operations.routes(context),
        admin.routes(context),
    ):
        app.include_router(router)
    failures.install(app)

    def openapi() -> dict[str, Any]:
        """Bodies are parsed by hand, for OpenAI's error shape; their schemas are added here."""
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            template = "#/components/schemas/{model}"
            _, definitions = models_json_schema([(m, "validation") for m in BODIES.values()], ref_template=template)
            schema.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
            for path, model in BODIES.items():
                reference = {"$ref": template.format(model=model.__name__)}
                body = {"required": True, "content": {"application/json": {"schema": reference}}}
                schema["paths"][path]["post"]["requestBody"] = body
                if path.startswith("/v1/"):
                    schema["paths"][path]["post"].setdefault("parameters", []).append(IDEMPOTENCY_KEY)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
    endpoints = frozenset({*BODIES, *schema_paths(app)})
    # Around the application, not a middleware of it: those lie within layers of its own that a request need not pass.
    return Gatekeeper(app, context, endpoints, direct={("POST", "/v1/moe/forward"): forward})


def schema_paths(app: FastAPI) -> set[str]:
    """Paths without parameters: those that may be a metric's label."""
    return {path for path in (getattr(route, "path", "") for route in app.routes) if path and "{" not in path}
