"""The performance report's figures, against plain definitions."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.generation import Observations
from services.gateway.operations import performance_report
from services.gateway.report import REPORT_SECONDS, Window, latency, percentile, recommendations
from shared.status import Fleet, Status
from shared.utilisation import entropy, expert_utilisation, imbalance
from tests.gateway.contexts import context
from tests.running import Watcher

COUNTS = st.lists(st.integers(0, 1000), min_size=2, max_size=12)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.sampled_from([0.0, 0.01, 0.5, 0.9, 0.95, 0.99, 1.0]))
def test_a_percentile_is_the_nearest_rank(values: list[float], q: float) -> None:
    assert percentile(values, q) == np.quantile(values, q, method="inverted_cdf")


def test_of_nothing_there_is_no_percentile() -> None:
    assert percentile([], 0.5) is None
    assert latency([]) == {"count": 0, "p50_ms": None, "p95_ms": None, "p99_ms": None}


def test_latencies_are_told_in_milliseconds() -> None:
    values = [n / 1000 for n in range(1, 101)]
    assert latency(values) == {"count": 100, "p50_ms": 50.0, "p95_ms": 95.0, "p99_ms": 99.0}


@settings(deadline=None)
@given(COUNTS)
def test_entropy_is_1_for_even_use_and_0_for_one_expert(counts: list[int]) -> None:
    value = entropy(counts)
    if value is None:
        assert not sum(counts)
        return
    shares = np.array(counts, dtype=float) / sum(counts)
    nats = -sum(p * math.log(p) for p in shares if p > 0)
    assert value == pytest.approx(nats / math.log(len(counts)))
    assert -1e-9 <= value <= 1 + 1e-9
    if len(set(counts)) == 1:
        assert value == pytest.approx(1)
    if sum(count > 0 for count in counts) == 1:
        assert value == pytest.approx(0)


@settings(deadline=None)
@given(COUNTS)
def test_imbalance_is_the_maximum_over_the_mean(counts: list[int]) -> None:
    value = imbalance(counts)
    assert value is None if not sum(counts) else value == pytest.approx(max(counts) / (sum(counts) / len(counts)))


def test_experts_tokens_are_those_of_all_routers_together() -> None:
    per_router = [[[1, 2, 3], [0, 0, 9]], [[4, 0, 0], [1, 1, 1]]]
    first, second = expert_utilisation((1, 3), per_router)
    assert first["layer"] == 1
    assert first["tokens"] == [5, 2, 3]
    assert second["tokens"] == [1, 1, 10]
    assert second["imbalance"] == 2.5


def test_a_router_that_has_not_said_anything_yet_counts_as_none() -> None:
    (layer,) = expert_utilisation((0,), [(), [[2, 2]]])
    assert layer["tokens"] == [2, 2]
    (nothing,) = expert_utilisation((0,), [])
    assert nothing == {"layer": 0, "tokens": [], "entropy": None, "imbalance": None}


def test_a_window_forgets_the_oldest_and_tells_what_is_recent() -> None:
    window = Window(3)
    for now in range(5):
        window.add(float(now), now * 10.0)
    assert window.since(0) == [20, 30, 40]
    assert window.since(3) == [30, 40]
    assert window.since(9) == []


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({}, []),
        ({"waiting": 3}, ["3 generations wait"]),
        ({"error_rate": 0.06}, ["6.0% of generations failed"]),
        ({"error_rate": 0.05}, []),
        ({"skew": 2.0}, ["2.0 times the mean"]),
        ({"skew": 1.5}, []),
        ({"kv_usage": 0.95}, ["95% of the KV blocks"]),
        ({"waiting": 1, "error_rate": 1.0, "skew": 8.0, "kv_usage": 1.0}, ["wait", "failed", "busiest", "KV"]),
    ],
)
def test_each_recommendation_follows_from_its_figure(figures: dict[str, float], words: list[str]) -> None:
    neutral = {"waiting": 0, "error_rate": None, "skew": None, "kv_usage": None}
    found = recommendations(**{**neutral, **figures})  # type: ignore[arg-type]
    assert len(found) == len(words)
    assert all(word in text for word, text in zip(words, found, strict=True))


# -- observations ------------------------------------------------------------------------------------------------------


def test_the_first_token_and_those_between_are_measured_apart() -> None:
    seen = Observations("test-observations")
    seen.token(arrival=10.0, last=None, now=10.5)
    seen.token(arrival=10.0, last=10.5, now=10.6)
    seen.token(arrival=10.0, last=10.6, now=10.8)
    seen.end(arrival=10.0, now=11.0, prompt_tokens=7, reason="stop")
    assert seen.first_token.since(0) == pytest.approx([0.5])
    assert seen.between_tokens.since(0) == pytest.approx([0.1, 0.2])
    assert seen.whole.since(0) == pytest.approx([1.0])
    assert (seen.tokens, seen.prompt_tokens, seen.finished, seen.failed) == (3, 7, 1, 0)


def observe_tokens(seen: Observations, count: int, seconds: float) -> None:
    """`count` tokens of one stream, evenly over the last `seconds`."""
    now = time.monotonic()
    last = None
    for n in range(count):
        at = now - seconds + seconds * (n + 0.5) / count
        seen.token(now - seconds, last, at)
        last = at


async def test_throughput_is_the_tokens_of_the_last_minute(watcher: Watcher) -> None:
    gateway = context(watcher.bus, Fleet())
    gateway.started = time.time() - 600
    observe_tokens(gateway.observations, 1200, 0.9 * REPORT_SECONDS)
    report = performance_report(gateway)
    assert report["throughput"]["output_tokens_per_second"] == pytest.approx(1200 / REPORT_SECONDS, rel=0.01)


async def test_throughput_has_no_ceiling(watcher: Watcher) -> None:
    gateway = context(watcher.bus, Fleet())
    gateway.started = time.time() - 600
    observe_tokens(gateway.observations, 60_000, 0.9 * REPORT_SECONDS)
    report = performance_report(gateway)
    assert report["throughput"]["output_tokens_per_second"] == pytest.approx(60_000 / REPORT_SECONDS, rel=0.01)


async def test_the_report_knows_what_routers_say_about_themselves(watcher: Watcher) -> None:
    fleet = Fleet()
    gateway = context(watcher.bus, fleet)
    layers = len(gateway.config.moe_layers)
    router = Status(
        service="router",
        instance="r",
        deployment=gateway.deployment,
        state="ready",
        kv_usage=0.97,
        expert_tokens=((80, *([0] * 7)),) * layers,
    )
    fleet.observe(router, time.monotonic())
    fleet.observe(Status(service="router", instance="other", deployment="another"), time.monotonic())
    report = performance_report(gateway)
    assert report["kv_cache_usage"] == 0.97
    assert [layer["imbalance"] for layer in report["experts"]] == [8.0] * layers
    assert any("KV blocks" in text for text in report["recommendations"])
    assert any("busiest expert" in text for text in report["recommendations"])


async def test_the_report_shows_the_whole_fleet_as_this_gateway_hears_it(watcher: Watcher) -> None:
    gateway = context(watcher.bus, Fleet())
    now = time.monotonic()
    for name in ("gateway-1", "gateway-2"):
        for at, tokens in ((now - 10, 0), (now, 50)):
            report = Status(service="gateway", instance=name, started=1.0, state="ready", tokens_total=tokens)
            gateway.history.observe(report, at)
    fleet = performance_report(gateway)["fleet"]
    assert fleet["throughput"]["output_tokens_per_second"] == pytest.approx(10.0)
    assert [i["instance"] for i in fleet["instances"]] == ["gateway-1", "gateway-2"]
