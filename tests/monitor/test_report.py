"""The fleet's report: observations made into figures and advice."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from services.monitor.observations import FORGOTTEN_SECONDS, History, Observation
from services.monitor.report import DeploymentReport, FleetReport, fleet_report
from shared.histogram import Histogram
from shared.status import Status

D = "demo-3f2a91bc"
SECONDS = 10.0


def status(instance: str, **fields: Any) -> Status:
    service = instance.split("-", maxsplit=1)[0]
    deployment = D if service in {"router", "expert"} else ""
    values: dict[str, Any] = {"service": service, "instance": instance, "started": 1.0, "state": "ready"}
    values |= {"deployment": deployment, "num_shards": 2} if deployment else {}
    values |= {"state_stored": True} if service == "monitor" else {}
    return Status(**values | fields)


def observed(*pairs: tuple[Status, Status], silent: tuple[Status, ...] = (), connected: bool = True) -> Observation:
    """A fleet that reported the first of each pair, and the second `SECONDS` later; `silent` only reported at first."""
    history = History(60.0)
    for before, _ in pairs:
        history.observe(before, 0.0)
    for each in silent:
        history.observe(each, 0.0)
    for _, after in pairs:
        history.observe(after, SECONDS)
    return history.observation(SECONDS, 1_767_225_600.0, connected=connected)


def still(instance: str, **fields: Any) -> tuple[Status, Status]:
    return status(instance, **fields), status(instance, **fields)


def counts(seconds: float, times: int) -> tuple[int, ...]:
    histogram = Histogram()
    for _ in range(times):
        histogram.observe(seconds)
    return histogram.counts()


def of(report: FleetReport, deployment: str = D) -> DeploymentReport:
    return next(d for d in report.deployments if d.deployment == deployment)


def test_of_nobody_everything_is_unknown_and_nothing_is_zero() -> None:
    report = fleet_report(observed())
    assert report.throughput.output_tokens_per_second is None
    assert report.throughput.requests_per_second is None
    assert (report.errors.rate, report.cache.hit_rate) == (None, None)
    assert (report.latency, report.deployments, report.instances) == ({}, (), ())
    assert [(s.service, s.instances) for s in report.services] == [
        ("gateway", 0),
        ("router", 0),
        ("expert", 0),
        ("monitor", 0),
    ]


def test_throughput_is_the_sum_of_all_gateways() -> None:
    report = fleet_report(
        observed(
            (status("gateway-1"), status("gateway-1", tokens_total=500, requests_total=20)),
            (status("gateway-2", tokens_total=9_000), status("gateway-2", tokens_total=9_100)),
        )
    )
    assert report.throughput.output_tokens_per_second == 60.0
    assert report.throughput.requests_per_second == 2.0


def test_latencies_merge_over_instances_and_are_told_in_milliseconds() -> None:
    fast, slow = counts(0.010, 90), counts(2.0, 10)
    report = fleet_report(
        observed(
            (status("gateway-1"), status("gateway-1", latencies={"end_to_end": fast})),
            (status("gateway-2"), status("gateway-2", latencies={"end_to_end": slow})),
            (status("router-1"), status("router-1", latencies={"step": counts(0.004, 5)})),
        )
    )
    whole = report.latency["gateway"]["end_to_end"]
    assert whole.count == 100
    assert whole.p50_ms == pytest.approx(10, rel=0.25)
    assert whole.p95_ms == pytest.approx(2000, rel=0.25)
    assert report.latency["router"]["step"].p50_ms == pytest.approx(4, rel=0.25)


def test_the_fleets_own_failures_make_the_rate_and_the_deepest_instance_is_named() -> None:
    failures = {"shard_unavailable": 6, "invalid_request": 30}
    report = fleet_report(
        observed(
            (status("gateway-1"), status("gateway-1", requests_total=64, errors=failures)),
            (status("router-1"), status("router-1", errors={"shard_unavailable": 6})),
            (status("router-2"), status("router-2", errors={"internal_error": 1})),
        )
    )
    assert report.errors.rate == 0.06
    assert report.errors.by_service["gateway"] == failures
    assert report.errors.worst is not None
    assert (report.errors.worst.instance, report.errors.worst.code) == ("router-1", "shard_unavailable")
    assert any("6.0% of requests failed, most with shard_unavailable at router-1" in r for r in report.recommendations)


def test_the_cache_has_a_rate_only_of_look_ups() -> None:
    report = fleet_report(
        observed((status("gateway-1"), status("gateway-1", cache_lookups=200, cache_hits=50))),
    )
    assert (report.cache.lookups, report.cache.hits, report.cache.hit_rate) == (200, 50, 0.25)
    assert any("25% of 200 look-ups" in r for r in report.recommendations)


def test_shards_name_who_serves_them_and_who_loads_them() -> None:
    report = fleet_report(
        observed(
            still("router-1"),
            still("expert-1", shards=(0,)),
            still("expert-2", shards=(0,), wanted_shards=(0, 1)),
            still("expert-3", state="loading", wanted_shards=(1,), loaded_bytes=1, total_bytes=4),
        )
    )
    first, second = of(report).shards
    assert (first.ready, first.loading) == (("expert-1", "expert-2"), ())
    assert (second.ready, second.loading, second.needed) == ((), ("expert-2", "expert-3"), True)
    assert any("no worker serves shard 1 of demo" in r for r in report.recommendations)
    assert next(i for i in report.instances if i.instance == "expert-3").loaded == 0.25


def test_a_shard_that_no_router_needs_is_not_missed() -> None:
    report = fleet_report(observed(still("expert-1", shards=(0,))))
    assert [s.needed for s in of(report).shards] == [False, False]
    assert not any("no worker serves" in r for r in report.recommendations)


def test_experts_are_summed_over_routers_with_entropy_and_imbalance() -> None:
    report = fleet_report(
        observed(
            (status("router-1", expert_tokens=((5, 5, 5, 5),)), status("router-1", expert_tokens=((15, 5, 5, 5),))),
            (status("router-2"), status("router-2", expert_tokens=((20, 10, 0, 0),))),
        )
    )
    (layer,) = of(report).layers
    assert layer.tokens == (30, 10, 0, 0)
    assert layer.imbalance == 3.0
    assert layer.entropy is not None
    assert 0 < layer.entropy < 1
    assert of(report).shard_imbalance == 1.5  # experts 0 and 2 are shard 0's: 30 of 40 tokens


def test_under_a_placement_that_moves_experts_the_routers_own_count_by_shard_is_told() -> None:
    moved = status("router-1", epoch=3, expert_tokens=((20, 10, 0, 0),), shard_tokens=((16, 14),))
    routed = (status("router-1", shard_tokens=((0, 0),)), moved)
    worked = [(status(f"expert-{n}"), status(f"expert-{n}", tokens_total=t)) for n, t in ((1, 300), (2, 100))]
    deployment = of(fleet_report(observed(routed, *worked)))
    assert deployment.epoch == 3
    assert deployment.shard_imbalance == pytest.approx(16 / 15, abs=1e-3)
    assert deployment.worker_imbalance == 1.5


def test_who_fell_silent_is_named_and_counts_for_nothing() -> None:
    gone = status("gateway-9", running=7, waiting=7, tokens_total=10**9)
    report = fleet_report(observed(still("gateway-1", running=1), silent=(gone,)))
    (gateways, *_) = report.services
    assert (gateways.instances, gateways.running, gateways.waiting) == (1, 1, 0)
    assert gateways.silent == ("gateway-9",)
    assert report.throughput.output_tokens_per_second == 0.0
    silent = next(i for i in report.instances if i.instance == "gateway-9")
    assert (silent.fresh, silent.age_seconds, silent.cpu, silent.tokens_per_second) == (False, SECONDS, None, None)
    assert any("gateway gateway-9 has fallen silent" in r for r in report.recommendations)


def test_without_nats_nobody_is_blamed_for_silence() -> None:
    report = fleet_report(observed(silent=(status("router-1"),), connected=False))
    assert any("NATS does not answer" in r for r in report.recommendations)
    assert not any("fallen silent" in r for r in report.recommendations)


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([still("router-1", kv_usage=0.95, num_shards=0)], "KV blocks of router-1"),
        ([still("gateway-1", waiting=4)], "4 requests wait"),
        ([still("gateway-1", host="h1", memory_limit_bytes=100, memory_available_bytes=4)], "memory is in use at h1"),
        ([still("monitor-1", state_stored=False)], "decisions are not kept"),
        ([still("expert-1", shards=(0, 1)), still("router-1")], "shards 0, 1 of demo-3f2a91bc: one worker only"),
        (
            [(status("gateway-1"), status("gateway-1", latencies={"time_to_first_token": counts(0.9, 9)}))],
            "first token",
        ),
        ([(status(f"expert-{n}"), status(f"expert-{n}", tokens_total=t)) for n, t in ((1, 900), (2, 1))], "2.0 times"),
    ],
)
def test_each_recommendation_follows_from_its_figure(pairs: list[tuple[Status, Status]], words: str) -> None:
    neutral = observed(still("gateway-1"), still("monitor-1"))
    assert fleet_report(neutral).recommendations == ()
    assert any(words in text for text in fleet_report(observed(*pairs)).recommendations)


def test_one_report_alone_gives_no_rate_and_no_use() -> None:
    history = History(60.0)
    history.observe(status("expert-1", tokens_total=5, memory_limit_bytes=100, memory_available_bytes=25), 0.0)
    (instance,) = fleet_report(history.observation(1.0, 0.0)).instances
    assert (instance.cpu, instance.tokens_per_second, instance.cores) == (None, None, None)
    assert instance.memory_used == 0.75


def test_the_report_is_json() -> None:
    report = fleet_report(observed(still("router-1", expert_tokens=((1, 2),)), still("expert-1", shards=(0,))))
    back = msgspec.json.decode(msgspec.json.encode(report))
    assert back["deployments"][0]["shards"][0]["ready"] == ["expert-1"]


def test_reports_that_are_kept_apart_lose_neither_the_first_nor_the_last() -> None:
    history = History(60.0, spacing=5.0)
    for second in range(31):
        history.observe(status("gateway-1", tokens_total=10 * second), float(second))
    (measured,) = history.observation(30.0, 0.0).instances
    assert (measured.seconds, measured.tokens, measured.age) == (30.0, 300, 0.0)
    assert len(history._reports["gateway", "gateway-1"]) <= 8


def test_names_that_do_not_come_back_are_forgotten_though_nobody_looks() -> None:
    history = History(60.0)
    for n in range(100):
        history.observe(status(f"gateway-{n}"), n * FORGOTTEN_SECONDS)
    assert len(history._reports) <= 2
