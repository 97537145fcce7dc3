"""Every metric of every service, with its unit (Prometheus' conventions: `_total`, `_seconds`, `_bytes`).

Families that dashboards expect from vLLM exist here under the `moe_` prefix with the same meaning.
"""

from __future__ import annotations

from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry


class Counter(prometheus_client.Counter):
    """Ours, so that `turn_off` touches nobody else's."""


class Gauge(prometheus_client.Gauge):
    """Ours, so that `turn_off` touches nobody else's."""


class Histogram(prometheus_client.Histogram):
    """Ours, so that `turn_off` touches nobody else's."""


def turn_off() -> None:
    """Make every metric of this process a call that does nothing (METRICS=off). /metrics stays, and shows no change."""

    def same(metric: Any, *_values: object, **_labels: object) -> Any:
        return metric

    def nothing(_metric: Any, *_values: object, **_named: object) -> None:
        return

    changes = {Counter: ("inc",), Gauge: ("inc", "dec", "set"), Histogram: ("observe",)}
    for kind, names in changes.items():
        setattr(kind, "labels", same)  # noqa: B010 - mypy takes no assignment to a method
        for name in names:
            setattr(kind, name, nothing)


REGISTRY = CollectorRegistry(auto_describe=True)

_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_DISPATCH = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 5)
_TAKEOVER = (0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 7.5, 10, 15, 20, 30, 60, 120)
_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

# every service
BUS_DROPPED = Counter("moe_bus_dropped_messages_total", "messages dropped, as they came too fast", registry=REGISTRY)
BAD_MESSAGES = Counter(
    "moe_bad_messages_total",
    "messages refused as none of their subject's: by the last word of the subject's form, or reply, headers, name",
    ["on"],
    registry=REGISTRY,
)

# gateway: what clients see
HTTP_REQUESTS = Counter("moe_http_requests_total", "HTTP requests", ["endpoint", "method", "status"], registry=REGISTRY)
HTTP_SECONDS = Histogram(
    "moe_http_request_duration_seconds", "HTTP request to last byte", ["endpoint"], buckets=_LATENCY, registry=REGISTRY
)
REQUESTS_RUNNING = Gauge(
    "moe_num_requests_running", "generations in flight (router: with KV blocks)", ["model_name"], registry=REGISTRY
)
REQUESTS_WAITING = Gauge("moe_num_requests_waiting", "generations in line", ["model_name"], registry=REGISTRY)
REQUEST_SUCCESS = Counter(
    "moe_request_success_total", "finished generations", ["model_name", "finished_reason"], registry=REGISTRY
)
ADMISSION_TIME = Histogram(
    "moe_admission_queue_time_seconds",
    "in the gateway's line, of those who got a place",
    buckets=_LATENCY,
    registry=REGISTRY,
)
SLOW_READERS = Counter(
    "moe_slow_readers_cut_total", "connections cut, as their readers took nothing any more", registry=REGISTRY
)
REJECTIONS = Counter("moe_rejections_total", "requests refused, by error code", ["code"], registry=REGISTRY)
PROMPT_TOKENS = Counter("moe_prompt_tokens_total", "prompt tokens", ["model_name"], registry=REGISTRY)
GENERATION_TOKENS = Counter("moe_generation_tokens_total", "generated tokens", ["model_name"], registry=REGISTRY)
TIME_TO_FIRST_TOKEN = Histogram(
    "moe_time_to_first_token_seconds", "arrival to first token", ["model_name"], buckets=_LATENCY, registry=REGISTRY
)
INTER_TOKEN_LATENCY = Histogram(
    "moe_inter_token_latency_seconds",
    "between two tokens of one stream",
    ["model_name"],
    buckets=_LATENCY,
    registry=REGISTRY,
)
RESUMPTIONS = Counter(
    "moe_generations_resumed_total", "generations that went on with another router", ["reason"], registry=REGISTRY
)
CACHE_LOOKUPS = Counter(
    "moe_cache_lookups_total", "answers looked up in the cache: hit, miss, unavailable", ["result"], registry=REGISTRY
)
IDEMPOTENT_REQUESTS = Counter(
    "moe_idempotent_requests_total",
    "requests with an Idempotency-Key: first, replayed, joined (the first still ran), mismatch (another request's key)",
    ["result"],
    registry=REGISTRY,
)
E2E_LATENCY = Histogram(
    "moe_e2e_request_latency_seconds", "arrival to last token", ["model_name"], buckets=_LATENCY, registry=REGISTRY
)

# router: the engine and its dispatch
QUEUE_TIME = Histogram(
    "moe_request_queue_time_seconds", "in the router's line", ["model_name"], buckets=_LATENCY, registry=REGISTRY
)
PREFILL_TIME = Histogram(
    "moe_request_prefill_time_seconds", "admission to first token", ["model_name"], buckets=_LATENCY, registry=REGISTRY
)
DECODE_TIME = Histogram(
    "moe_request_decode_time_seconds", "first to last token", ["model_name"], buckets=_LATENCY, registry=REGISTRY
)
KV_CACHE_USAGE = Gauge("moe_kv_cache_usage_ratio", "share of KV blocks in use", ["model_name"], registry=REGISTRY)
PREEMPTIONS = Counter(
    "moe_preemptions_total", "sequences sent back for lack of blocks", ["model_name"], registry=REGISTRY
)
BATCH_TOKENS = Histogram(
    "moe_batch_size_tokens", "tokens in one step", ["model_name"], buckets=_ROWS, registry=REGISTRY
)
STEP_SECONDS = Histogram("moe_step_seconds", "one engine step", ["model_name"], buckets=_LATENCY, registry=REGISTRY)
DISPATCH_SECONDS = Histogram(
    "moe_dispatch_seconds", "one layer's experts, sent to combined", ["layer"], buckets=_DISPATCH, registry=REGISTRY
)
DISPATCH_RETRIES = Counter("moe_dispatch_retries_total", "expert calls sent again", ["reason"], registry=REGISTRY)
DISPATCH_HEDGES = Counter(
    "moe_dispatch_hedges_total", "slow expert calls sent to a second worker too", registry=REGISTRY
)
RETRIES_REFUSED = Counter(
    "moe_dispatch_retries_refused_total", "times that the retry budget made an expert call wait", registry=REGISTRY
)
DISPATCH_AT_HOME = Counter(
    "moe_dispatch_at_home_total", "expert calls for copies that were not there, made at home", registry=REGISTRY
)
DEGRADED_TOKENS = Counter(
    "moe_degraded_tokens_total", "tokens computed without some of their experts (DEGRADED_MODE=skip)", registry=REGISTRY
)
EXPERT_TOKENS = Counter("moe_expert_tokens_total", "tokens sent to an expert", ["layer", "expert"], registry=REGISTRY)
PROMPT_LENGTH = Histogram(
    "moe_request_prompt_tokens", "prompt length", ["model_name"], buckets=_TOKENS, registry=REGISTRY
)

# expert workers
EXPERT_CALLS = Counter("moe_expert_calls_total", "answered calls", ["shard"], registry=REGISTRY)
EXPERT_ERRORS = Counter("moe_expert_errors_total", "calls answered with an error", ["code"], registry=REGISTRY)
EXPERT_SECONDS = Histogram(
    "moe_expert_compute_seconds", "one call's compute", ["shard"], buckets=_DISPATCH, registry=REGISTRY
)
TAKEOVER_SECONDS = Histogram(
    "moe_takeover_seconds",
    "last sign of a shard's lost worker to served by this one",
    ["reason"],
    buckets=_TAKEOVER,
    registry=REGISTRY,
)
COPY_BYTES = Gauge("moe_copied_experts_bytes", "weights held of copies of other shards' experts", registry=REGISTRY)
SHARD_BYTES = Gauge("moe_shard_weights_bytes", "weights held, by shard", ["shard"], registry=REGISTRY)

# monitor
INSTANCES = Gauge("moe_instances", "live instances", ["service", "state"], registry=REGISTRY)
SHARD_REPLICAS = Gauge("moe_shard_replicas", "ready workers of a shard", ["deployment", "shard"], registry=REGISTRY)
SHARDS_MISSING = Gauge("moe_shards_missing", "shards that no ready worker serves", ["deployment"], registry=REGISTRY)
EVENTS = Counter("moe_events_total", "events published", ["kind"], registry=REGISTRY)
STATE_STORED = Gauge("moe_state_stored", "1: the monitor's state is in JetStream, 0: it is not", registry=REGISTRY)
SHARD_IMBALANCE = Gauge(
    "moe_shard_imbalance",
    "most loaded shard over the mean: expected of the moving average by the plan, measured by the routers lately",
    ["deployment", "kind"],
    registry=REGISTRY,
)
PLAN_EPOCH = Gauge("moe_plan_epoch", "number of the plan that is told", ["deployment"], registry=REGISTRY)

# monitor: alerts
ALERTS = Gauge("moe_alerts", "alerts: pending, firing", ["alert", "severity", "state"], registry=REGISTRY)
ALERT_NOTIFICATIONS = Counter(
    "moe_alert_notifications_total",
    "notifications for the webhook: delivered, failed, dropped (too many waited)",
    ["result"],
    registry=REGISTRY,
)

# monitor: scaling
SCALING_INSTANCES = Gauge(
    "moe_scaling_instances",
    "of a service, as scaling sees it: current, wanted by the metrics, desired after all rules",
    ["service", "kind"],
    registry=REGISTRY,
)
SCALING_DECISIONS = Counter(
    "moe_scaling_decisions_total",
    "told decisions: scale_up, scale_down, scaling_held",
    ["service", "decision"],
    registry=REGISTRY,
)
