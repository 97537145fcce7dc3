"""POST /v1/moe/forward and /v1/moe/route: one MoE layer by itself, and which experts a text takes."""

from __future__ import annotations

import uuid
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from services.gateway.context import Context, parse
from services.gateway.openai_types import ForwardBody, RouteBody
from services.gateway.sse import while_connected
from services.router.messages import ForwardReply, ForwardRequest, GenerateRequest
from shared import subjects, wire
from shared.bus import BUDGET_MS, REQUEST_ID, NoRespondersError
from shared.errors import BadMessageError, MoeError
from shared.logs import request_id

MSGPACK = "application/msgpack"
RAW = "application/octet-stream"
OVERHEAD_BYTES = 4096
Array = npt.NDArray[np.generic]


class PackedForward(msgspec.Struct):
    """The msgpack body of /v1/moe/forward."""

    layer: Annotated[int, msgspec.Meta(ge=0)]
    hidden_states: wire.Tensor
    model: str | None = None


async def _read(request: Request, context: Context) -> tuple[int, Array, str]:
    """(layer, hidden states [T, H], the answer's media type) of a request in one of the three forms."""
    kind = request.headers.get("content-type", "").split(";")[0].strip()
    if kind == RAW:
        body = await request.body()
        layer = request.query_params.get("layer", "")
        if not (layer.isascii() and layer.isdigit() and len(layer) < 10):
            raise MoeError("invalid_request", "raw bodies need the layer's number as ?layer=N", param="layer")
        row = 4 * context.config.hidden_size
        if len(body) % row:
            text = f"a raw body must be rows of {context.config.hidden_size} float32, {row} bytes each; got {len(body)}"
            raise MoeError("invalid_request", text, param="hidden_states")
        return int(layer), np.frombuffer(body, dtype="<f4").reshape(-1, context.config.hidden_size), RAW
    if kind in (MSGPACK, "application/x-msgpack"):
        try:
            packed = msgspec.msgpack.decode(await request.body(), type=PackedForward)
            context.check_model(packed.model)
            return packed.layer, packed.hidden_states.to_numpy(), MSGPACK
        except (msgspec.MsgspecError, ValueError, RecursionError, BadMessageError) as error:
            raise MoeError("invalid_request", f"the body is not valid msgpack: {error}") from None
    body_json = await parse(request, ForwardBody)
    context.check_model(body_json.model)
    try:
        return body_json.layer, np.array(body_json.hidden_states, dtype=np.float32), "application/json"
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


def routes(context: Context) -> APIRouter:
    """The endpoints, bound to their context."""
    router = APIRouter(tags=["moe"])

    async def ask(layer: int, hidden: Array) -> ForwardReply:
        message = ForwardRequest(layer=layer, hidden_states=wire.Tensor.from_numpy(hidden))
        seconds = context.settings.timeout_seconds
        headers = {REQUEST_ID: request_id.get(), BUDGET_MS: f"{seconds * 1000:.0f}"}
        subject = subjects.forward(context.deployment)
        try:
            reply = await context.bus.request(subject, wire.encode(message), timeout=seconds, headers=headers)
        except NoRespondersError:
            raise MoeError("router_unavailable", "no router is ready; try again in a moment") from None
        return wire.decode(ForwardReply, reply)

    async def forward_rows(layer: int, hidden: Array) -> list[Array]:
        """The layer's output, expert indices and weights; rows are split where the bus' limit asks for it."""
        top_k = context.config.num_experts_per_tok
        row_bytes = 4 * hidden.shape[1] + 12 * top_k
        rows = max(1, (context.bus.max_payload - OVERHEAD_BYTES) // row_bytes)
        parts = [await ask(layer, hidden[start : start + rows]) for start in range(0, hidden.shape[0], rows)]
        return [
            np.concatenate([getattr(part, name).to_numpy() for part in parts])
            for name in ("hidden_states", "top_k_index", "top_k_weights")
        ]

    @router.post("/v1/moe/forward")
    async def forward(request: Request) -> Response:
        """Send hidden states through one MoE layer: JSON, msgpack, or raw float32 with ?layer=N."""
        layer, hidden, kind = await _read(request, context)
        hidden = _check(context, layer, hidden)
        out, index, weights = await while_connected(request, forward_rows(layer, hidden))
        if kind == RAW:
            return Response(out.tobytes(), media_type=RAW)
        names = ("hidden_states", "top_k_index", "top_k_weights")
        if kind == MSGPACK:
            tensors = {n: wire.Tensor.from_numpy(a) for n, a in zip(names, (out, index, weights), strict=True)}
            return Response(msgspec.msgpack.encode({"v": 1, "layer": layer, **tensors}), media_type=MSGPACK)
        arrays = {n: a.tolist() for n, a in zip(names, (out, index, weights), strict=True)}
        return Response(msgspec.json.encode({"layer": layer, **arrays}), media_type="application/json")

    async def route_tokens(ids: list[int]) -> Array:
        wanted = GenerateRequest(
            id=f"route-{uuid.uuid4().hex}", token_ids=ids, max_tokens=0, return_routing=True, client=context.instance
        )
        rows: list[Array] = []
        async for _, piece in context.run([wanted], []):
            rows += [tensor.to_numpy() for tensor in piece.routing]
        return np.concatenate(rows)  # [T, L, k]

    @router.post("/v1/moe/route")
    async def route(request: Request) -> Response:
        """Tell which experts each token of a text takes, layer by layer."""
        body = await parse(request, RouteBody)
        context.check_model(body.model)
        ids = await context.encode(body.prompt) if isinstance(body.prompt, str) else body.prompt
        context.check_tokens(ids)
        routing = await while_connected(request, route_tokens(ids))
        layers: list[dict[str, Any]] = [
            {"layer": layer, "experts": routing[:, row].tolist()} for row, layer in enumerate(context.config.moe_layers)
        ]
        tokens = [context.tokenizer.token_text(token) for token in ids]
        return JSONResponse({"model": context.model_name, "token_ids": ids, "tokens": tokens, "layers": layers})

    return router
