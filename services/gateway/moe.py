"""POST /v1/moe/forward and /v1/moe/route: one MoE layer by itself, and which experts a text takes."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Awaitable, Callable
from typing import Annotated, Any
from urllib.parse import parse_qs

import msgspec
import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Request, Response

from services.gateway.completions import DEGRADED
from services.gateway.context import Context, parse, parse_json
from services.gateway.forwards import Answer
from services.gateway.openai_types import ForwardBody, RouteBody
from services.gateway.sse import answer as whole
from services.gateway.sse import said_aloud, while_connected
from services.router.messages import GenerateRequest
from shared import wire
from shared.errors import BadMessageError, MoeError

MSGPACK = "application/msgpack"
RAW = "application/octet-stream"
JSON = "application/json"
Array = npt.NDArray[np.generic]
Endpoint = Callable[[Request], Awaitable[Response]]


class PackedForward(msgspec.Struct):
    """The msgpack body of /v1/moe/forward."""

    layer: Annotated[int, msgspec.Meta(ge=0)]
    hidden_states: wire.Tensor
    model: str | None = None


_packed = msgspec.msgpack.Decoder(PackedForward)


@functools.lru_cache(maxsize=256)
def _layer(query: bytes) -> int:
    """The layer's number in a query string.

    Raises:
        MoeError: `invalid_request`.

    """
    layer = parse_qs(query.decode("latin-1")).get("layer", [""])[-1]
    if not (layer.isascii() and layer.isdigit() and len(layer) < 10):
        raise MoeError("invalid_request", "raw bodies need the layer's number as ?layer=N", param="layer")
    return int(layer)


def _read(context: Context, kind: str, query: bytes, body: bytes) -> tuple[int, Array, str]:
    """(layer, hidden states [T, H], the answer's media type) of a body in one of the three forms.

    Raises:
        MoeError: `invalid_request` or `model_not_found`.

    """
    if kind == RAW:
        layer = _layer(query)
        row = 4 * context.config.hidden_size
        if len(body) % row:
            text = f"a raw body must be rows of {context.config.hidden_size} float32, {row} bytes each; got {len(body)}"
            raise MoeError("invalid_request", text, param="hidden_states")
        return layer, np.frombuffer(body, dtype="<f4").reshape(-1, context.config.hidden_size), RAW
    if kind in (MSGPACK, "application/x-msgpack"):
        try:
            packed = _packed.decode(body)
            context.check_model(packed.model)
            return packed.layer, packed.hidden_states.to_numpy(), MSGPACK
        except (msgspec.MsgspecError, ValueError, RecursionError, BadMessageError) as error:
            raise MoeError("invalid_request", f"the body is not valid msgpack: {error}") from None
    body_json = parse_json(body, ForwardBody)
    context.check_model(body_json.model)
    try:
        return body_json.layer, np.array(body_json.hidden_states, dtype=np.float32), JSON
    except ValueError:
        raise MoeError("invalid_request", "hidden_states: rows differ in length", param="hidden_states") from None


def _check(context: Context, layer: int, hidden: Array) -> Array:
    if layer not in context.config.moe_layers:
        text = f"layer {layer} has no experts; those that have: {list(context.config.moe_layers)}"
        raise MoeError("invalid_request", text, param="layer")
    size = context.config.hidden_size
    if hidden.ndim != 2 or hidden.shape[1] != size or not hidden.shape[0]:
        text = f"hidden_states must have the shape [tokens, {size}], not {list(hidden.shape)}"
        raise MoeError("invalid_request", text, param="hidden_states")
    if not np.issubdtype(hidden.dtype, np.floating):
        raise MoeError("invalid_request", f"hidden_states must be floats, not {hidden.dtype}", param="hidden_states")
    hidden = hidden.astype(np.float32, copy=False)
    if not np.isfinite(hidden).all():
        raise MoeError("invalid_request", "hidden_states has NaN or infinite values", param="hidden_states")
    return hidden


def _write(kind: str, layer: int, answer: Answer) -> Response:
    said = DEGRADED[answer.degraded]
    headers = said_aloud(said)
    if kind == RAW:
        return Response(answer.hidden_states.tobytes(), media_type=RAW, headers=headers)
    parts = {name: part for name, part in answer._asdict().items() if name != "degraded"}
    if kind == MSGPACK:
        tensors = {name: wire.Tensor.from_numpy(part) for name, part in parts.items()}
        return Response(
            msgspec.msgpack.encode({"v": 1, "layer": layer, **tensors, **said}), media_type=MSGPACK, headers=headers
        )
    arrays = {name: part.tolist() for name, part in parts.items()}
    return Response(msgspec.json.encode({"layer": layer, **arrays, **said}), media_type=JSON, headers=headers)


def forward_endpoint(context: Context) -> Endpoint:
    """POST /v1/moe/forward, bound to its context."""
    forwards = context.forwards

    async def forward(request: Request) -> Response:
        """Send hidden states through one MoE layer: JSON, msgpack, or raw float32 with ?layer=N."""
        kind = request.headers.get("content-type", "").split(";")[0].strip()
        layer, hidden, kind = _read(context, kind, request.scope["query_string"], await request.body())
        hidden = _check(context, layer, hidden)
        if forwards.is_small(hidden):
            # Who leaves meanwhile is not looked for: the rows are on their way with those of others.
            return _write(kind, layer, await forwards.small(layer, hidden))
        return _write(kind, layer, await while_connected(request, forwards.large(layer, hidden)))

    return forward


def routes(context: Context, forward: Endpoint) -> APIRouter:
    """The endpoints, bound to their context."""
    router = APIRouter(tags=["moe"])
    router.add_api_route("/v1/moe/forward", forward, methods=["POST"])

    async def route_tokens(ids: list[int]) -> tuple[Array, bool]:
        wanted = GenerateRequest(
            id=f"route-{uuid.uuid4().hex}", token_ids=ids, max_tokens=0, return_routing=True, client=context.instance
        )
        rows: list[Array] = []
        degraded = False
        async for _, piece in context.run([wanted], []):
            rows += [tensor.to_numpy() for tensor in piece.routing]
            degraded |= piece.degraded
        return np.concatenate(rows), degraded  # [T, L, k]

    @router.post("/v1/moe/route")
    async def route(request: Request) -> Response:
        """Tell which experts each token of a text takes, layer by layer."""
        body = await parse(request, RouteBody)
        context.check_model(body.model)
        ids = await context.encode(body.prompt) if isinstance(body.prompt, str) else body.prompt
        context.check_tokens(ids)
        routing, degraded = await while_connected(request, route_tokens(ids))
        layers: list[dict[str, Any]] = [
            {"layer": layer, "experts": routing[:, row].tolist()} for row, layer in enumerate(context.config.moe_layers)
        ]
        tokens = [context.tokenizer.token_text(token) for token in ids]
        model = context.model_name
        return whole({"model": model, "token_ids": ids, "tokens": tokens, "layers": layers, **DEGRADED[degraded]})

    return router
