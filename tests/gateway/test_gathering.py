"""Which requests travel together, decided without a clock."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.gathering import QUIET_SECONDS, Gathering, Member

WAIT = 0.02


def line(max_rows: int = 8) -> Gathering[str]:
    return Gathering(max_rows, WAIT)


def join(gathering: Gathering[str], name: str, rows: int = 1, since: float = 0.0) -> Member[str]:
    member = Member(rows, since, name)
    gathering.join(member)
    return member


def names(batch: list[Member[str]]) -> str:
    return "".join(member.payload for member in batch)


def test_nothing_waits_while_nothing_is_under_way() -> None:
    gathering = line()
    assert gathering.take(0.0) == []
    join(gathering, "a")
    assert names(gathering.take(0.0)) == "a"


def test_what_comes_meanwhile_leaves_together_when_the_first_is_back() -> None:
    gathering = line()
    join(gathering, "a")
    first = gathering.take(0.0)
    for name in "bcd":
        join(gathering, name)
    assert gathering.take(0.001) == []
    gathering.came_back(first, 0.002)
    join(gathering, "e")  # the first's client, again
    assert names(gathering.take(0.003)) == "bcde"


def test_a_full_batch_does_not_wait() -> None:
    gathering = line(max_rows=4)
    join(gathering, "a")
    gathering.take(0.0)
    for name in "bcdef":
        join(gathering, name)
    assert names(gathering.take(0.0)) == "bcde"
    assert gathering.take(0.0) == []
    assert gathering.rows == 1


def test_rows_count_not_requests_and_order_is_kept() -> None:
    gathering = line(max_rows=4)
    for name, rows in (("a", 3), ("b", 3), ("c", 1), ("d", 2)):
        join(gathering, name, rows)
    assert names(gathering.take(0.0)) == "a"
    assert names(gathering.take(0.0)) == "bc"
    assert gathering.take(0.0) == []


def test_nobody_waits_longer_than_agreed() -> None:
    gathering = line()
    join(gathering, "a")
    gathering.take(0.0)
    join(gathering, "b", since=0.001)
    assert gathering.look(0.002) == 0.001 + WAIT
    assert gathering.take(0.020) == []
    assert names(gathering.take(0.001 + WAIT)) == "b"


def test_as_many_rows_as_before_are_waited_for_while_requests_come() -> None:
    gathering = line()
    for name in "abc":
        join(gathering, name)
    first = gathering.take(0.0)
    gathering.came_back(first, 0.010)
    join(gathering, "a", since=0.0101)
    assert gathering.take(0.0101) == []
    assert gathering.look(0.0101) == 0.010 + QUIET_SECONDS
    looked = 0.010 + 1.5 * QUIET_SECONDS
    assert gathering.look(looked) == looked + QUIET_SECONDS, "one came since the last look"
    assert gathering.take(looked) == []
    join(gathering, "b", since=looked)
    join(gathering, "c", since=looked)
    assert names(gathering.take(looked)) == "abc"


def test_when_nobody_comes_back_those_who_wait_leave() -> None:
    gathering = line()
    for name in "abc":
        join(gathering, name)
    first = gathering.take(0.0)
    join(gathering, "d", since=0.009)
    gathering.came_back(first, 0.010)
    assert gathering.take(0.010) == []
    assert gathering.look(0.010 + 1.5 * QUIET_SECONDS) == 0.009 + WAIT
    assert names(gathering.take(0.010 + 1.5 * QUIET_SECONDS)) == "d"


def test_a_late_look_does_not_end_the_wait() -> None:
    gathering = line()
    for name in "ab":
        join(gathering, name)
    gathering.came_back(gathering.take(0.0), 0.010)
    assert gathering.look(0.018) == 0.018 + QUIET_SECONDS, "the caller was busy: requests may lie unread"
    join(gathering, "a", since=0.0185)
    assert gathering.take(0.0185) == []


def test_who_leaves_is_not_sent() -> None:
    gathering = line()
    join(gathering, "a")
    first = gathering.take(0.0)
    member = join(gathering, "b", rows=3)
    join(gathering, "c")
    gathering.leave(member)
    gathering.leave(first[0])  # is gone already
    assert gathering.rows == 1
    gathering.came_back(first, 0.001)
    assert names(gathering.take(0.001 + WAIT)) == "c"


@given(st.lists(st.tuples(st.integers(1, 5), st.sampled_from(["join", "back", "look", "pass"])), max_size=60))
def test_each_leaves_once_in_order_and_no_batch_is_too_large(steps: list[tuple[int, str]]) -> None:
    gathering: Gathering[int] = Gathering(8, WAIT)
    now, joined = 0.0, 0
    out: list[list[Member[int]]] = []
    left: list[int] = []
    for amount, action in steps:
        now += 0.0004 * amount
        if action == "join":
            gathering.join(Member(amount, now, joined))
            joined += 1
        elif action == "back" and out:
            gathering.came_back(out.pop(0), now)
        elif action == "pass":
            now += WAIT
        gathering.look(now)
        while batch := gathering.take(now):
            assert sum(member.rows for member in batch) <= 8
            out.append(batch)
            left += [member.payload for member in batch]
        assert gathering.under_way == len(out)
        assert all(now - member.since < WAIT for member in gathering.waiting)
        assert gathering.rows == sum(member.rows for member in gathering.waiting)
        assert gathering.under_way or gathering.wanted_rows or not gathering.waiting
    assert left == list(range(len(left)))
    assert len(left) + len(gathering.waiting) == joined
