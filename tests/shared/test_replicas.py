"""Who is asked next: turns, silence, ejection with its cap, and the way back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shared.replicas import ANYTHING, FIRST_EJECTION_SECONDS, LONGEST_EJECTION_SECONDS, SILENT_SECONDS, Replicas
from shared.status import State, Status


def report(instance: str, *shards: int, state: State = "ready", deployment: str = "d") -> Status:
    return Status(service="expert", instance=instance, deployment=deployment, state=state, shards=shards)


def workers(*instances: str) -> Replicas:
    """Workers of shard 0, all heard of at 0."""
    replicas = Replicas("expert", "d")
    for instance in instances:
        replicas.observe(report(instance, 0), 0.0)
    return replicas


def test_they_take_turns() -> None:
    replicas = workers("a", "b", "c")
    chosen = [replicas.choose(0, 0.0) for _ in range(6)]
    assert sorted(set(chosen), key=str) == ["a", "b", "c"]
    assert chosen[:3] == chosen[3:]


def test_nobody_is_known_for_a_shard_that_no_one_reported() -> None:
    assert workers("a").choose(1, 0.0) is None
    assert not workers("a").served(1, 0.0)


def test_the_silent_the_draining_and_other_deployments_are_not_asked() -> None:
    replicas = workers("a", "b")
    replicas.observe(report("c", 0, deployment="other"), 0.0)
    replicas.observe(report("b", 0, state="draining"), 1.0)
    assert {replicas.choose(0, 1.0) for _ in range(4)} == {"a"}
    assert replicas.choose(0, SILENT_SECONDS + 0.1) is None
    assert replicas.last_served(0) == 0.0


def test_a_report_of_other_shards_replaces_the_earlier_one() -> None:
    replicas = workers("a")
    replicas.observe(report("a", 1, 2), 1.0)
    assert replicas.choose(0, 1.0) is None
    assert replicas.choose(1, 1.0) == replicas.choose(2, 1.0) == "a"


def test_who_fails_is_left_out_for_longer_each_time_and_let_back_in_when_it_answers() -> None:
    replicas = workers("a", "b")
    replicas.failed("a", 0.0)
    assert {replicas.choose(0, 0.5) for _ in range(4)} == {"b"}
    assert not replicas.has_other(0, 0.5, "b")
    now = FIRST_EJECTION_SECONDS
    assert {replicas.choose(0, now) for _ in range(4)} == {"b"}, "it has not been heard of since"
    replicas.observe(report("a", 0), now)
    assert {replicas.choose(0, now) for _ in range(4)} == {"a", "b"}
    replicas.failed("a", now)
    assert {replicas.choose(0, 1.9 * now) for _ in range(4)} == {"b"}
    replicas.answered("a")
    assert {replicas.choose(0, 1.9 * now) for _ in range(4)} == {"a", "b"}


def test_several_calls_that_fail_together_are_one_failure() -> None:
    replicas = workers("a", "b")
    for _ in range(10):
        replicas.failed("a", 0.0)
    assert replicas.ejections == 1
    replicas.observe(report("a", 0), 0.5)
    assert {replicas.choose(0, FIRST_EJECTION_SECONDS) for _ in range(2)} == {"a", "b"}


def test_who_is_gone_comes_back_with_its_next_report() -> None:
    replicas = workers("a", "b")
    replicas.gone("a")
    assert {replicas.choose(0, 0.0) for _ in range(4)} == {"b"}
    replicas.observe(report("a", 0), 1.0)
    assert {replicas.choose(0, 1.0) for _ in range(4)} == {"a", "b"}


def test_routers_all_do_the_same() -> None:
    replicas = Replicas("router", "d")
    replicas.observe(Status(service="router", instance="r", deployment="d", state="ready"), 0.0)
    assert replicas.choose(ANYTHING, 0.0) == "r"


@given(
    st.lists(
        st.tuples(st.sampled_from(["failed", "answered", "gone", "report"]), st.sampled_from("abc"), st.floats(0, 2)),
        max_size=60,
    )
)
def test_whatever_happens_one_that_is_heard_of_can_be_asked(events: list[tuple[str, str, float]]) -> None:
    replicas, now = Replicas("expert", "d"), 0.0
    heard: dict[str, float] = {}
    for what, instance, passed in events:
        now += passed
        if what == "report":
            replicas.observe(report(instance, 0), now)
            heard[instance] = now
        elif what == "gone":
            replicas.gone(instance)
            heard.pop(instance, None)
        elif what == "failed":
            replicas.failed(instance, now)
        else:
            replicas.answered(instance)
        live = {name for name, at in heard.items() if now - at <= SILENT_SECONDS}
        chosen = replicas.choose(0, now)
        assert (chosen in live) if live else (chosen is None)
        assert replicas.choose(0, now, live) is None


def test_who_fails_for_ever_is_left_out_for_no_longer_than_the_rule_says() -> None:
    replicas = workers("a", "b")
    now = 0.0
    for _ in range(2000):
        replicas.observe(report("a", 0), now)
        replicas.failed("a", now)
        now += LONGEST_EJECTION_SECONDS
    assert replicas.ejections == 2000
    replicas.observe(report("a", 0), now)
    assert replicas.choose(0, now) == "a"
