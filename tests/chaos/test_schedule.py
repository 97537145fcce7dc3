"""The same seed gives the same strikes, and nobody is struck whom no peer can stand in for."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.chaos_schedule import (
    KINDS,
    LEAST_STOP_SECONDS,
    MOST_STOP_SECONDS,
    Kind,
    Member,
    Strike,
    schedule,
    spared,
    victim,
)

COUNTS: dict[Kind, int] = {"expert": 4, "router": 2, "monitor": 1, "nats": 1}


def test_the_same_seed_gives_the_same_schedule_and_another_seed_another() -> None:
    assert schedule(1, 100, 600, COUNTS) == schedule(1, 100, 600, COUNTS)
    assert schedule(1, 100, 600, COUNTS) != schedule(2, 100, 600, COUNTS)
    assert schedule(1, 1, 600, COUNTS) == [Strike(0, 80.619, "expert", 1, "stop", 1.47)], "it changed for everybody"


@given(st.integers(), st.integers(1, 200), st.floats(1, 3600), st.sets(st.sampled_from(KINDS), min_size=1))
def test_strikes_spread_over_the_time_and_the_processes(
    seed: int, count: int, seconds: float, kinds: set[Kind]
) -> None:
    counts = {kind: COUNTS[kind] for kind in kinds}
    strikes = schedule(seed, count, seconds, counts)
    assert [strike.number for strike in strikes] == list(range(count))
    for strike in strikes:
        assert strike.number * seconds / count - 0.001 <= strike.at <= (strike.number + 1) * seconds / count + 0.001
        assert 0 <= strike.index < counts[strike.kind]
        if strike.action == "stop":
            assert LEAST_STOP_SECONDS <= strike.seconds <= MOST_STOP_SECONDS
        else:
            assert strike.seconds == 0


def test_every_process_is_as_likely_as_any_other() -> None:
    met = Counter((strike.kind, strike.index) for strike in schedule(3, 8000, 600, COUNTS))
    assert len(met) == sum(COUNTS.values())
    assert all(800 < times < 1200 for times in met.values())


def test_nothing_to_strike_gives_no_strikes() -> None:
    assert schedule(1, 10, 60, {}) == []


def expert(index: int, *shards: int, ready: bool = True) -> Member:
    return Member("expert", index, ready, shards)


FLEET = [expert(0, 0), expert(1, 1), expert(2, 0), expert(3, 1), Member("router", 0, True), Member("router", 1, True)]


@pytest.mark.parametrize(
    ("member", "members", "why"),
    [
        (FLEET[0], FLEET, ""),
        (FLEET[0], [FLEET[0], FLEET[1], expert(2, 0, ready=False), FLEET[3]], "nobody else serves shard 0"),
        (expert(0, 0, 1), [expert(0, 0, 1), expert(1, 1)], "nobody else serves shard 0"),
        (expert(0, 0, 1), [expert(0, 0, 1), expert(1, 1), expert(2, 0)], ""),
        (expert(0, 0, ready=False), FLEET, "it is not ready"),
        (expert(0), FLEET, "it serves no shard"),
        (FLEET[4], FLEET, ""),
        (FLEET[4], [*FLEET[:5], Member("router", 1, False)], "no other router is ready"),
        (Member("nats", 0, True), [Member("nats", 0, True)], ""),
        (Member("monitor", 0, True), [Member("monitor", 0, True)], ""),
        (Member("monitor", 0, False), [Member("monitor", 0, False)], "it is not ready"),
    ],
)
def test_who_has_no_peer_is_spared(member: Member, members: list[Member], why: str) -> None:
    assert spared(member, members) == why


def test_another_of_the_kind_takes_the_place_of_one_that_is_spared() -> None:
    strike = Strike(0, 0, "expert", 1, "kill")
    assert victim(strike, FLEET) == FLEET[1]
    assert victim(strike, [FLEET[0], FLEET[1], FLEET[2], expert(3, 1, ready=False)]) == FLEET[2]
    assert victim(strike, [FLEET[0], FLEET[1]]) is None
    assert victim(strike, [FLEET[4], FLEET[5]]) is None
