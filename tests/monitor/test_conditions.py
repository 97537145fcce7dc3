"""What each rule says of the figures: bad, good, between, or that nobody can tell."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.monitor.conditions import (
    expert_imbalance,
    figures,
    high_error_rate,
    high_latency,
    low_cache_hit_rate,
    our_failures,
    queue_saturated,
    resource_exhaustion,
)
from services.monitor.observations import Measured
from services.monitor.rules import RULES, Reading
from shared.errors import HTTP_STATUS
from tests.monitor.observing import DEPLOYMENT, counts, instance, seen, settings

SETTINGS = settings()
STALE = 4.0
GIB = 2**30


def only(readings: Iterable[Reading]) -> Reading:
    (reading,) = readings
    return reading


# -- high_latency ----------------------------------------------------------------------------------------------------


def latency(*milliseconds: float, **more: Any) -> Reading:
    gateway = instance("gateway-1", latencies={"time_to_first_token": counts(*milliseconds)}, **more)
    return only(high_latency(seen(gateway), SETTINGS))


def test_a_p95_above_the_threshold_is_bad_and_below_the_other_good() -> None:
    slow = latency(*[100] * 90, *[900] * 10)
    assert (slow.verdict, slow.subject, slow.threshold, slow.deployment) == ("bad", DEPLOYMENT, 0.5, DEPLOYMENT)
    assert slow.value == pytest.approx(0.9, rel=0.25)
    assert "time to first token" in slow.text
    assert "100 samples" in slow.text
    assert latency(*[100] * 96, *[900] * 4).verdict == "good"
    assert latency(*[450] * 100).verdict == "between"


def test_few_samples_say_nothing() -> None:
    few = latency(*[9000] * (SETTINGS.alert_min_samples - 1))
    assert few.verdict == "unknown"
    assert latency(*[9000] * SETTINGS.alert_min_samples).verdict == "bad"


def test_that_nothing_was_asked_is_good_only_if_all_say_so() -> None:
    assert latency().verdict == "good"
    assert latency(running=3).verdict == "unknown", "requests without a first token yet are no sign of health"
    assert latency(waiting=1).verdict == "unknown"
    assert latency(age=STALE).verdict == "unknown"
    assert latency(seconds=0.0).verdict == "unknown"
    silent = instance("gateway-2", age=STALE)
    assert only(high_latency(seen(instance("gateway-1"), silent), SETTINGS)).verdict == "unknown"
    drained = instance("gateway-2", age=STALE, state="draining")
    assert only(high_latency(seen(instance("gateway-1"), drained), SETTINGS)).verdict == "good"


def test_the_settings_say_which_latency() -> None:
    gateway = instance(
        "gateway-1", latencies={"time_to_first_token": counts(*[10] * 50), "inter_token": counts(*[900] * 50)}
    )
    assert only(high_latency(seen(gateway), SETTINGS)).verdict == "good"
    other = only(high_latency(seen(gateway), settings(alert_latency="inter_token")))
    assert (other.verdict, "inter token" in other.text) == ("bad", True)


def test_gateways_of_one_deployment_are_judged_together_and_others_apart() -> None:
    fast = instance("gateway-1", latencies={"time_to_first_token": counts(*[10] * 30)})
    slow = instance("gateway-2", latencies={"time_to_first_token": counts(*[900] * 30)})
    assert only(high_latency(seen(fast, slow), SETTINGS)).verdict == "bad"
    elsewhere = instance("gateway-2", latencies=slow.latencies, deployment="other-00000000")
    assert {r.deployment: r.verdict for r in high_latency(seen(fast, elsewhere), SETTINGS)} == {
        DEPLOYMENT: "good",
        "other-00000000": "bad",
    }


# -- high_error_rate -------------------------------------------------------------------------------------------------


def errors(*instances: Measured) -> Reading:
    return only(high_error_rate(seen(*instances), SETTINGS))


def test_only_failures_of_ours_count() -> None:
    theirs = {code: 50 for code, status in HTTP_STATUS.items() if status < 500}
    assert errors(instance("gateway-1", requests=100, failures=theirs)).verdict == "good"
    assert our_failures(instance("gateway-1", failures={**theirs, "internal_error": 2, "a_later_code": 1})) == {
        "internal_error": 2,
        "a_later_code": 1,
    }


def test_a_share_of_failures_above_the_threshold_is_bad() -> None:
    bad = errors(instance("gateway-1", requests=94, failures={"internal_error": 6}))
    assert (bad.verdict, bad.value, bad.threshold) == ("bad", 0.06, 0.05)
    assert errors(instance("gateway-1", requests=96, failures={"internal_error": 4})).verdict == "between"
    assert errors(instance("gateway-1", requests=98, failures={"internal_error": 2})).verdict == "good"
    assert errors(instance("gateway-1", requests=5, failures={"internal_error": 5})).verdict == "unknown"
    assert errors(instance("gateway-1")).verdict == "good"
    assert errors(instance("gateway-1", age=STALE)).verdict == "unknown"


def test_the_worst_service_code_and_instance_are_named() -> None:
    gateway = instance("gateway-1", requests=50, failures={"shard_unavailable": 40, "deadline_exceeded": 3})
    router_1 = instance("router-1", failures={"shard_unavailable": 30, "queue_timeout": 2})
    router_2 = instance("router-2", failures={"shard_unavailable": 10})
    only_there = errors(gateway, router_1, router_2)
    assert "shard_unavailable at router router-1 (30 times)" in only_there.text
    assert only_there.instance == "router-1"
    expert = instance("expert-1", failures={"internal_error": 60})
    assert "internal_error at expert expert-1 (60 times)" in errors(gateway, router_1, router_2, expert).text
    hardly = instance("expert-1", failures={"internal_error": 1})
    assert errors(gateway, router_1, router_2, hardly).instance == "router-1"
    assert errors(gateway).instance == "gateway-1"


def test_without_gateways_the_routers_are_asked() -> None:
    reading = errors(instance("router-1", requests=50, failures={"internal_error": 50}))
    assert (reading.verdict, reading.instance) == ("bad", "router-1")


# -- low_cache_hit_rate ----------------------------------------------------------------------------------------------


def test_the_hit_rate_counts_where_a_cache_is_in_use() -> None:
    def rate(lookups: int, hits: int) -> Reading:
        return only(low_cache_hit_rate(seen(instance("gateway-1", cache_lookups=lookups, cache_hits=hits)), SETTINGS))

    assert list(low_cache_hit_rate(seen(instance("gateway-1")), SETTINGS)) == []
    assert (rate(100, 59).verdict, rate(100, 62).verdict, rate(100, 65).verdict) == ("bad", "between", "good")
    assert (rate(100, 59).value, rate(100, 59).threshold) == (0.59, 0.6)
    assert rate(10, 0).verdict == "unknown"


# -- resource_exhaustion ---------------------------------------------------------------------------------------------


def memory(*instances: Measured) -> Reading:
    return only(resource_exhaustion(seen(*instances), SETTINGS))


def on_host(name: str, free: float, **more: Any) -> Measured:
    """An instance at a host of 10 GiB."""
    facts = {"host": "host-1", "memory_limit_bytes": 10 * GIB, "memory_available_bytes": int(free * GIB), **more}
    return instance(name, **facts)


def test_memory_is_judged_by_host_and_calls_for_more_instances() -> None:
    full = memory(on_host("router-1", 0.5), on_host("gateway-1", 0.5))
    assert (full.verdict, full.subject, full.action) == ("bad", "host-1", None)
    assert full.value == pytest.approx(0.95)
    assert RULES["resource_exhaustion"].action == "scale_up"
    assert "gateway-1, router-1" in full.text
    assert memory(on_host("router-1", 1.2)).verdict == "between"
    assert memory(on_host("router-1", 2.0)).verdict == "good"


def test_where_weights_dominate_it_says_that_scaling_does_not_help() -> None:
    heavy = memory(on_host("expert-1", 0.5, loaded_bytes=4 * GIB), on_host("expert-2", 0.5, loaded_bytes=4 * GIB))
    assert (heavy.verdict, heavy.action) == ("bad", "investigate")
    assert "more instances would not help" in heavy.text
    assert "QUANTIZATION=8bit" in heavy.advice
    light = memory(on_host("expert-1", 0.5, loaded_bytes=4 * GIB))
    assert (light.action, light.advice) == (None, "")


def test_memory_that_nobody_reports_is_unknown_or_no_matter() -> None:
    assert list(resource_exhaustion(seen(instance("router-1")), SETTINGS)) == []
    assert memory(on_host("router-1", 0.1, age=STALE)).verdict == "unknown"


# -- expert_imbalance ------------------------------------------------------------------------------------------------


def balance(*rows: tuple[int, ...], shards: int = 4, **more: Any) -> Reading:
    return only(expert_imbalance(seen(instance("router-1", num_shards=shards, expert_tokens=rows, **more)), SETTINGS))


def test_the_busiest_shard_is_compared_with_the_mean() -> None:
    assert balance((500,) * 8, (500,) * 8).verdict == "good"
    skewed = balance((1000, 0, 0, 0, 1000, 100, 100, 100), (0,) * 8)
    assert skewed.verdict == "bad"
    assert skewed.value == pytest.approx(2000 * 4 / 2300)
    assert f"shard 0 of {DEPLOYMENT}" in skewed.text
    assert balance((900, 500, 300, 300), (0,) * 4).verdict == "between"
    assert balance((10, 0, 0, 0)).verdict == "unknown"
    assert balance().verdict == "good"
    assert balance((10_000, 0, 0, 0), age=STALE).verdict == "unknown"


def test_routers_count_together() -> None:
    routers = [
        instance(f"router-{n}", num_shards=4, expert_tokens=(tuple(4000 if e == n else 0 for e in range(4)),))
        for n in range(4)
    ]
    assert only(expert_imbalance(seen(*routers), SETTINGS)).value == 1.0


# -- queue_saturated -------------------------------------------------------------------------------------------------


def test_a_line_is_saturated_by_what_may_wait() -> None:
    def line(waiting: int, limit: int, **more: Any) -> list[Reading]:
        return list(queue_saturated(seen(instance("router-1", waiting=waiting, queue_limit=limit, **more)), SETTINGS))

    assert [r.verdict for n in (81, 80, 51, 50) for r in line(n, 100)] == ["bad", "between", "between", "good"]
    (full,) = line(100, 100)
    assert (full.subject, full.service, full.instance, full.value) == ("router-1", "router", "router-1", 1.0)
    assert line(0, 0) == []
    (late,) = line(100, 100, age=STALE)
    assert (late.verdict, late.value) == ("unknown", None)


# -- all together ----------------------------------------------------------------------------------------------------

parts = st.lists(
    st.builds(
        instance,
        st.sampled_from(["gateway-1", "gateway-2", "router-1", "expert-1", "monitor-1"]),
        age=st.sampled_from([0.1, STALE]),
        seconds=st.sampled_from([0.0, 60.0]),
        requests=st.integers(0, 50),
        failures=st.dictionaries(st.sampled_from(sorted(HTTP_STATUS)), st.integers(1, 50), max_size=4),
        cache_lookups=st.integers(0, 50),
        waiting=st.integers(0, 9),
        queue_limit=st.integers(0, 9),
        num_shards=st.integers(0, 3),
        expert_tokens=st.lists(st.tuples(*[st.integers(0, 999)] * 4), max_size=2).map(tuple),
        memory_limit_bytes=st.integers(0, 3),
        memory_available_bytes=st.integers(0, 9),
        loaded_bytes=st.integers(0, 9),
        host=st.sampled_from(["", "host-1"]),
        latencies=st.just({"time_to_first_token": counts(1, 10, 1000)}),
    ),
    max_size=5,
    unique_by=lambda m: m.instance,
)


@given(parts)
def test_whatever_is_reported_each_rule_says_one_thing_of_each_subject(instances: list[Measured]) -> None:
    readings = figures(seen(*instances), SETTINGS)
    assert len({r.key for r in readings}) == len(readings)
    for each in readings:
        assert each.rule in RULES
        assert each.value is not None or each.verdict in ("unknown", "good")
        assert each.text


@given(parts)
def test_nothing_is_bad_or_good_by_the_word_of_those_who_are_silent(instances: list[Measured]) -> None:
    silent = [Measured(m.status, STALE) for m in instances]
    assert {r.verdict for r in figures(seen(*silent), SETTINGS)} <= {"unknown"}
