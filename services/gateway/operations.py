"""What operators and tools ask: models, health, load, version, metrics, the performance report, tokenizing."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from services.gateway.context import Context, parse
from services.gateway.openai_types import DetokenizeBody, TokenizeBody
from services.gateway.report import REPORT_SECONDS, latency, recommendations
from services.monitor.report import fleet_report
from shared.discovery import VERSION
from shared.errors import MoeError
from shared.instrumentation import REGISTRY, REQUESTS_RUNNING, REQUESTS_WAITING
from shared.utilisation import expert_utilisation


def health(context: Context) -> tuple[bool, dict[str, Any]]:
    """(whether a completion could be produced now, what each part says)."""
    ready = [s for s in context.routers() if s.state == "ready"]
    workers = [s for s in context.fleet.live("expert") if s.deployment == context.deployment]
    covered = context.fleet.covered_shards(context.deployment)
    num_shards = max([s.num_shards for s in [*ready, *workers]], default=0)
    missing = sorted(set(range(num_shards)) - covered)
    checks = {
        "gateway": not context.draining,
        "bus": context.bus.connected,
        "router": bool(ready),
        "experts": num_shards > 0 and not missing,
    }
    ok = all(checks.values())
    return ok, {
        "status": "ok" if ok else "draining" if context.draining else "unavailable",
        "model": context.model_name,
        "deployment": context.deployment,
        "parts": {
            "gateway": {"ready": checks["gateway"], "instance": context.instance},
            "bus": {"ready": checks["bus"]},
            "router": {"ready": checks["router"], "instances": [s.instance for s in ready]},
            "experts": {
                "ready": checks["experts"],
                "shards": num_shards,
                "missing_shards": missing,
                "instances": {s.instance: {"state": s.state, "shards": list(s.shards)} for s in workers},
            },
            "monitor": {"ready": bool(context.fleet.live("monitor"))},
            # Without it answers are slower, never wrong, so it is not one of the checks.
            **({"cache": {"ready": context.answers.available}} if context.answers.enabled else {}),
        },
    }


def performance_report(context: Context) -> dict[str, Any]:
    """The report over the last minute, and totals since the start."""
    o, now = context.observations, time.monotonic()
    start = now - REPORT_SECONDS
    routers = context.routers()
    experts = expert_utilisation(context.config.moe_layers, [s.expert_tokens for s in routers])
    finished, failed = o.finish_rate.since(start), o.failure_rate.since(start)
    error_rate = failed / (finished + failed) if finished + failed else None
    kv_usage = max((s.kv_usage for s in routers), default=None)
    skew = max((layer["imbalance"] for layer in experts if layer["imbalance"] is not None), default=None)
    seconds = min(REPORT_SECONDS, max(time.time() - context.started, 1e-9))
    return {
        "model": context.model_name,
        "window_seconds": REPORT_SECONDS,
        "throughput": {
            "output_tokens_per_second": round(o.token_rate.since(start) / seconds, 2),
            "requests_per_second": round(finished / seconds, 3),
        },
        "totals": {
            "finished": o.finished,
            "failed": o.failed,
            "prompt_tokens": o.prompt_tokens,
            "generation_tokens": o.tokens,
        },
        "error_rate": error_rate,
        "latency": {
            "time_to_first_token": latency(o.first_token.since(start)),
            "inter_token": latency(o.between_tokens.since(start)),
            "end_to_end": latency(o.whole.since(start)),
        },
        "queue": {"running": context.admission.running, "waiting": context.admission.waiting},
        "kv_cache_usage": kv_usage,
        "answer_cache": {
            "lookups": context.answers.lookups,
            "hits": context.answers.hits,
            "hit_rate": round(context.answers.hits / context.answers.lookups, 4) if context.answers.lookups else None,
        },
        "experts": experts,
        "recommendations": recommendations(
            waiting=context.admission.waiting, error_rate=error_rate, skew=skew, kv_usage=kv_usage
        ),
        # The rest is this gateway's own view; this is everybody's, from the reports that it hears anyway.
        "fleet": msgspec.to_builtins(
            fleet_report(context.history.observation(now, time.time(), connected=context.bus.connected))
        ),
    }


def routes(context: Context) -> APIRouter:
    """The endpoints, bound to their context."""
    router = APIRouter(tags=["operations"])
    running = REQUESTS_RUNNING.labels(context.model_name)
    waiting = REQUESTS_WAITING.labels(context.model_name)

    def model() -> dict[str, Any]:
        return {
            "id": context.model_name,
            "object": "model",
            "created": int(context.started),
            "owned_by": "openmoe",
            "max_model_len": context.max_model_len,
            "vocab_size": context.config.vocab_size,
            "hidden_size": context.config.hidden_size,
            "moe_layers": list(context.config.moe_layers),
        }

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the served model."""
        return {"object": "list", "data": [model()]}

    @router.get("/v1/models/{name}")
    async def one_model(name: str) -> dict[str, Any]:
        """Describe the served model."""
        context.check_model(name)
        return model()

    @router.get("/health")
    async def get_health() -> Response:
        """Say per part what is ready; 503 when a completion could not be produced."""
        ok, body = health(context)
        return JSONResponse(body, 200 if ok else 503, headers={} if ok else {"Retry-After": "1"})

    @router.get("/live")
    async def live() -> dict[str, str]:
        """Answer while the process runs."""
        return {"status": "ok"}

    @router.get("/version")
    async def version() -> dict[str, str]:
        """Tell the version."""
        return {"version": VERSION}

    @router.get("/load")
    async def load() -> dict[str, int]:
        """Tell how many generations are in flight and in line."""
        return {"running": context.admission.running, "waiting": context.admission.waiting}

    @router.get("/metrics")
    async def metrics() -> Response:
        """Give Prometheus' text format."""
        running.set(context.admission.running)
        waiting.set(context.admission.waiting)
        return Response(generate_latest(REGISTRY), media_type=CONTENT_TYPE_LATEST)

    @router.get("/performance-report")
    async def report() -> dict[str, Any]:
        """Report throughput, latencies, experts' use and what follows from them."""
        return performance_report(context)

    @router.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, Any]:
        """Give the token ids of a text."""
        body = await parse(request, TokenizeBody)
        context.check_model(body.model)
        ids = await context.encode(body.prompt, add_special_tokens=body.add_special_tokens)
        return {"tokens": ids, "count": len(ids), "max_model_len": context.max_model_len}

    @router.post("/detokenize")
    async def detokenize(request: Request) -> dict[str, str]:
        """Give the text of token ids."""
        body = await parse(request, DetokenizeBody)
        context.check_model(body.model)
        if body.tokens and max(body.tokens) >= context.config.vocab_size:
            raise MoeError("invalid_request", "a token id is out of the vocabulary", param="tokens")
        return {"prompt": context.tokenizer.decode(body.tokens, skip_special_tokens=False)}

    return router
