"""Settings come from the environment, typed and checked at start; one wrong value gives one line that names it."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Literal, NoReturn, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from redis.asyncio import Redis

from shared.errors import StartError

MIB = 1024 * 1024
DegradedMode = Literal["fail", "skip"]
DEMO_MODEL = Path(__file__).resolve().parent.parent / "models" / "demo"
SECRETS = ("API_AUTH_TOKEN", "REDIS_URL", "ALERT_WEBHOOK_URL")


class ServiceSettings(BaseSettings):
    """What every service reads."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True)

    env: Literal["development", "staging", "production"] = Field("development", description="where this runs")
    model: Path = Field(DEMO_MODEL, description="folder of a Hugging Face checkpoint")
    served_model_name: str | None = Field(None, description="the model's name in the API (default: the folder's)")
    nats_url: str = Field("nats://127.0.0.1:4222", description="the NATS server")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="least level that is logged")
    host: str = Field("127.0.0.1", description="address that HTTP listens on")
    metrics: Literal["on", "off"] = Field("on", description="off: /metrics counts nothing, at no cost")
    metrics_port: int = Field(0, ge=0, le=65535, description="port of /metrics (0: a free one, named in the log)")
    instance: str | None = Field(None, pattern=r"^[A-Za-z0-9_-]{1,64}$", description="this process' name on the bus")
    timeout_seconds: float = Field(30, gt=0, le=3600, description="longest wait for the next sign of progress")
    grace_seconds: float = Field(10, ge=0, le=600, description="time for work in flight after SIGTERM")

    @field_validator("model")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        try:
            return value.expanduser().resolve()
        except (RuntimeError, OSError) as error:  # ~nobody has no home
            raise ValueError(str(error)) from None

    @field_validator("nats_url")
    @classmethod
    def _is_nats(cls, value: str) -> str:
        if not re.match(r"(nats|tls|ws|wss)://.+", value):
            raise ValueError("must begin with nats://, tls://, ws:// or wss://")
        return value

    @property
    def model_name(self) -> str:
        return self.served_model_name or self.model.name


class ComputeSettings(ServiceSettings):
    """What the services that run the model read."""

    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: the checkpoint's own")
    expert_shards: int = Field(2, ge=1, le=1024, description="expert e belongs to shard e mod EXPERT_SHARDS")
    torch_threads: int = Field(0, ge=0, le=1024, description="threads per process (0: chosen from the cores)")
    enable_compilation: bool | None = Field(
        None, description="compile our kernels at start (default: where that pays and g++ or clang++ is there)"
    )

    @model_validator(mode="after")
    def _compilation_fits(self) -> Self:
        if self.device != "cpu" and self.enable_compilation:
            raise ValueError(f"ENABLE_COMPILATION=true needs DEVICE=cpu, not {self.device}")
        return self


class GatewaySettings(ServiceSettings):
    port: int = Field(8000, ge=0, le=65535, description="port that HTTP listens on")
    api_auth_token: str | None = Field(None, min_length=8, description="bearer token that clients must send")
    max_concurrent_requests: int = Field(64, ge=1, le=65536, description="generations in flight; more wait in line")
    max_queued_requests: int = Field(1024, ge=0, le=1_000_000, description="generations in line; more get HTTP 429")
    max_queue_seconds: float = Field(
        5,
        gt=0,
        le=3600,
        description="longest expected wait in line; a tenth of it in overload that lasts so long; else HTTP 429",
    )
    forward_batch_rows: int = Field(
        256, ge=1, le=65536, description="rows of small /v1/moe/forward requests that travel together"
    )
    forward_wait_ms: float = Field(
        100, ge=0, le=10_000, description="longest wait of such a request for others, while earlier ones are under way"
    )
    max_body_mb: int = Field(32, ge=1, le=1024, description="largest HTTP body")
    max_model_len: int | None = Field(None, ge=1, description="longest prompt + completion (default: the model's)")
    redis_url: str | None = Field(None, description="the Redis that keeps answers (default: none are kept)")
    enable_caching: bool = Field(True, description="with REDIS_URL: give known answers to repeated requests")
    cache_ttl_seconds: int = Field(3600, ge=1, le=31_536_000, description="how long an answer is kept")
    idempotency_ttl_seconds: int = Field(
        600, ge=1, le=604_800, description="how long the answer to a request with an Idempotency-Key is kept"
    )
    idempotency_cache_mb: int = Field(64, ge=1, le=65536, description="memory for such answers; the oldest go first")

    @field_validator("redis_url")
    @classmethod
    def _is_redis(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not re.match(r"(redis|rediss|unix)://.+", value):
            raise ValueError("must begin with redis://, rediss:// or unix://")
        try:
            Redis.from_url(value)
        except ValueError:  # its text may quote a part of the password
            raise ValueError("must be of the form redis://[user:password@]host[:port][/database]") from None
        return value

    @model_validator(mode="after")
    def _production_is_closed(self) -> Self:
        if self.env == "production" and not self.api_auth_token:
            raise ValueError("API_AUTH_TOKEN must be set when ENV=production")
        return self


class RouterSettings(ComputeSettings):
    batch_size: int = Field(16, ge=1, le=4096, description="sequences that decode together")
    max_waiting: int = Field(1024, ge=1, le=1_000_000, description="sequences in a router's line; more are refused")
    prefill_chunk_tokens: int = Field(
        256, ge=1, le=65536, description="most prompt tokens per step, all prompts together"
    )
    kv_cache_mb: int = Field(512, ge=1, description="memory for the KV cache")
    kv_block_tokens: int = Field(64, ge=1, le=1024, description="tokens in one KV block")
    max_model_len: int | None = Field(None, ge=1, description="longest prompt + completion (default: the model's)")
    expert_recovery_seconds: float = Field(10, ge=0, le=600, description="wait for a shard that has no worker")
    degraded_mode: DegradedMode = Field(
        "fail", description="then: fail with HTTP 503, or skip its experts and say so in the answer"
    )


class ExpertSettings(ComputeSettings):
    workers: int = Field(2, ge=1, le=1024, description="expert workers that start together and share the shards")
    shards: str | None = Field(None, pattern=r"^\d+(,\d+)*$", description="pin this worker to these shards: 0,2")
    max_pending_calls: int = Field(64, ge=1, le=65536, description="calls in a worker's line; more are refused")
    widen_weights: Literal["auto", "on", "off"] = Field(
        "auto", description="not compiled: keep bfloat16 experts as float32 (auto: if that pays and memory is ample)"
    )
    quantization: Literal["none", "8bit"] = Field("none", description="8bit: keep experts as int8, on a CPU")
    sparsity_ratio: float = Field(0, ge=0, lt=1, description="share of each expert's channels that is left out")

    simulated_pair_ms: float | None = Field(
        None, ge=0, le=1000, description="for benchmarks only: sleep so long per token and expert, and answer zeros"
    )

    @property
    def pinned_shards(self) -> tuple[int, ...]:
        return tuple(sorted({int(s) for s in self.shards.split(",")})) if self.shards else ()

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        if self.device != "cpu" and self.quantization != "none":
            raise ValueError(f"QUANTIZATION={self.quantization} needs DEVICE=cpu, not {self.device}")
        if self.device != "cpu" and self.widen_weights == "on":
            raise ValueError(f"WIDEN_WEIGHTS=on needs DEVICE=cpu, not {self.device}")
        if self.quantization != "none" and self.widen_weights == "on":
            raise ValueError(f"WIDEN_WEIGHTS=on and QUANTIZATION={self.quantization} exclude each other")
        return self

    @model_validator(mode="after")
    def _shards_exist(self) -> Self:
        if any(shard >= self.expert_shards for shard in self.pinned_shards):
            raise ValueError(f"SHARDS={self.shards} names a shard that EXPERT_SHARDS={self.expert_shards} has not")
        return self

    @model_validator(mode="after")
    def _production_computes(self) -> Self:
        if self.env == "production" and self.simulated_pair_ms is not None:
            raise ValueError("SIMULATED_PAIR_MS gives zeros for answers and is refused when ENV=production")
        return self


class MonitorSettings(ServiceSettings):
    stale_seconds: float = Field(5, gt=0, le=600, description="a silent instance counts as down after this")

    monitor_port: int = Field(
        8001, ge=0, le=65535, description="port of the monitor's page (0: a free one, named in the log)"
    )
    rebalance: Literal["on", "off"] = Field("on", description="on: copy hot experts to other shards")
    rebalance_threshold: float = Field(
        1.5, ge=1, le=1024, description="do so when the most loaded shard has so many times the mean"
    )
    rebalance_extra_experts: int = Field(
        2, ge=0, le=1024, description="most copies per shard and MoE layer, beside the shard's own experts"
    )
    rebalance_half_life_seconds: float = Field(
        120, gt=0, le=86_400, description="after this a token counts half in the average load of its experts"
    )
    rebalance_min_tokens: int = Field(
        2000, ge=1, le=1_000_000_000, description="least tokens per MoE layer in that average"
    )
    rebalance_interval_seconds: float = Field(60, ge=1, le=86_400, description="least time between two plans")
    alert_latency: Literal["time_to_first_token", "inter_token", "end_to_end"] = Field(
        "time_to_first_token", description="the latency that high_latency looks at"
    )
    alert_latency_ms: float = Field(500, gt=0, description="high_latency fires above this p95")
    alert_latency_clear_ms: float = Field(400, gt=0, description="and clears at this one")
    alert_error_rate: float = Field(
        0.05, gt=0, le=1, description="high_error_rate fires above this share of requests that fail with HTTP 5xx"
    )
    alert_error_rate_clear: float = Field(0.025, ge=0, le=1, description="and clears at this one")
    alert_cache_hit_rate: float = Field(
        0.6, ge=0, le=1, description="low_cache_hit_rate fires below this share of look-ups that find an answer"
    )
    alert_cache_hit_rate_clear: float = Field(0.65, ge=0, le=1, description="and clears at this one")
    alert_memory: float = Field(
        0.9, gt=0, le=1, description="resource_exhaustion fires above this share of a host's or container's memory"
    )
    alert_memory_clear: float = Field(0.85, gt=0, le=1, description="and clears at this one")
    alert_imbalance: float = Field(
        2.0, ge=1, description="expert_imbalance fires above this many times the mean, of the busiest shard's tokens"
    )
    alert_imbalance_clear: float = Field(1.5, ge=1, description="and clears at this many")
    alert_queue: float = Field(0.8, gt=0, le=1, description="queue_saturated fires above this share of a full line")
    alert_queue_clear: float = Field(0.5, ge=0, le=1, description="and clears at this one")
    alert_window_seconds: float = Field(60, ge=5, le=600, description="what alerts look back on, for rates and latency")
    alert_min_samples: int = Field(
        20, ge=1, description="requests or look-ups in the window below which their rates are unknown"
    )
    alert_min_tokens: int = Field(
        1000, ge=1, description="tokens to experts in the window below which their imbalance is unknown"
    )
    alert_pending_seconds: float = Field(
        15, ge=0, le=3600, description="how long a figure is bad before its alert fires"
    )
    alert_urgent_pending_seconds: float = Field(
        0, ge=0, le=3600, description="the same of service_down and shard_without_replica"
    )
    alert_repeat_seconds: float = Field(
        14_400, ge=1, le=604_800, description="when the webhook is told again of what still fires"
    )
    alert_forget_seconds: float = Field(
        3600, ge=1, le=604_800, description="when an alert ends about something that was not heard of since"
    )
    alert_webhook_url: str | None = Field(
        None, description="where alerts are sent, as Alertmanager's webhook JSON (default: nowhere)"
    )
    alert_webhook_timeout_seconds: float = Field(5, gt=0, le=60, description="longest wait for the webhook's answer")
    scaling_executor: Literal["none", "local", "compose", "kubernetes"] = Field(
        "none", description="who changes the number of workers and routers; none: decisions are only told"
    )
    scaling_dry_run: bool = Field(False, description="decide and tell, change nothing")
    min_workers: int = Field(2, ge=1, le=1024, description="least expert workers that scaling leaves")
    max_workers: int = Field(16, ge=1, le=1024, description="most expert workers that scaling asks for")
    min_routers: int = Field(1, ge=1, le=1024, description="least routers that scaling leaves")
    max_routers: int = Field(4, ge=1, le=1024, description="most routers that scaling asks for")
    scale_up_at: float = Field(0.8, gt=0, le=10, description="more, when a metric is above this share of its target")
    scale_down_at: float = Field(0.3, ge=0, lt=1, description="fewer, when all metrics stay below this share")
    scaling_tolerance: float = Field(0.1, ge=0, lt=1, description="the count aims so far below SCALE_UP_AT")
    scaling_cooldown_seconds: float = Field(60, ge=0, le=86_400, description="no second change within this time")
    scaling_window_seconds: float = Field(
        300, ge=0, le=86_400, description="load must be low for so long, without a gap, before there are fewer"
    )
    scaling_look_seconds: float = Field(15, ge=2, le=600, description="decisions look at the last so many seconds")
    scaling_attempts: int = Field(3, ge=1, le=100, description="scale-ups in a row that change nothing before it stops")
    scaling_latency: Literal["time_to_first_token", "inter_token", "end_to_end"] = Field(
        "time_to_first_token", description="the latency that response_time means"
    )
    scaling_latency_ms: float = Field(500, gt=0, le=3_600_000, description="target of its 95th percentile")
    scaling_queue_target: float = Field(4, gt=0, le=1_000_000, description="requests in line per worker, as a target")
    scaling_supervisor: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_-]{1,64}$", description="local: whom to ask (`openmoe up` sets it)"
    )
    scaling_targets: str = Field(
        "expert=expert,router=router",
        pattern=r"^(expert|router)=[a-z0-9]([-a-z0-9_.]*[a-z0-9])?(,(expert|router)=[a-z0-9]([-a-z0-9_.]*[a-z0-9])?)?$",
        description="compose, kubernetes: the names of the services or Deployments; one left out is not scaled",
    )
    scaling_compose_directory: Path | None = Field(None, description="compose: the project's folder (default: here)")
    scaling_kubernetes_url: str = Field(
        "https://kubernetes.default.svc", pattern=r"^https?://.+", description="kubernetes: the API"
    )
    scaling_kubernetes_account: Path = Field(
        Path("/var/run/secrets/kubernetes.io/serviceaccount"),
        description="kubernetes: folder with the service account's token, ca.crt and namespace",
    )

    @field_validator("alert_webhook_url")
    @classmethod
    def _is_http(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            parts = urlsplit(value)
            fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # its text may quote a part of the URL
            fits = False
        if not fits:
            raise ValueError("must be of the form http://host[:port]/path or https://host[:port]/path")
        return value

    @model_validator(mode="after")
    def _alerts_clear_where_all_is_well(self) -> Self:
        def put(name: str) -> str:
            return f"ALERT_{name.upper()}={getattr(self, f'alert_{name}'):g}"

        for name in ("latency_ms", "error_rate", "cache_hit_rate", "memory", "imbalance", "queue"):
            clearing = "latency_clear_ms" if name == "latency_ms" else f"{name}_clear"
            fires, clears = getattr(self, f"alert_{name}"), getattr(self, f"alert_{clearing}")
            wrong, side = (clears < fires, "least") if name == "cache_hit_rate" else (clears > fires, "most")
            if wrong:
                raise ValueError(f"{put(clearing)} must be at {side} {put(name)}")
        return self

    @model_validator(mode="after")
    def _scaling_fits(self) -> Self:
        for least, most in (("min_workers", "max_workers"), ("min_routers", "max_routers")):
            if getattr(self, least) > getattr(self, most):
                values = f"{least.upper()}={getattr(self, least)}", f"{most.upper()}={getattr(self, most)}"
                raise ValueError(f"{values[0]} is more than {values[1]}")
        if self.scale_down_at >= self.scale_up_at / (1 + self.scaling_tolerance):
            raise ValueError("SCALE_DOWN_AT must lie below what SCALE_UP_AT and SCALING_TOLERANCE make the aim")
        return self


S = TypeVar("S", bound=ServiceSettings)


def load(kind: type[S]) -> S:
    """Settings of `kind` from the environment; a secret NAME may also come from the file that NAME_FILE names.

    Raises:
        StartError: one line naming each wrong variable.

    """
    secrets: dict[str, str] = {}
    for name in SECRETS:
        path = os.environ.get(f"{name}_FILE")
        if path and not os.environ.get(name):
            try:
                secrets[name.lower()] = Path(path).read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise StartError(f"{name}_FILE={path}: {error}") from None
    try:
        return kind(**{k: v for k, v in secrets.items() if k in kind.model_fields})  # type: ignore[arg-type]
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            name = "_".join(str(part) for part in problem["loc"]).upper()
            text = problem["msg"].removeprefix("Value error, ")
            secret = name in SECRETS
            lines.append(f"{name}={'(hidden)' if secret else problem['input']!r}: {text}" if name else text)
        raise StartError("; ".join(lines)) from None


def refuse(error: StartError) -> NoReturn:
    """End the process with the one line that says why."""
    sys.stderr.write(f"error: {error}\n")
    raise SystemExit(2)
