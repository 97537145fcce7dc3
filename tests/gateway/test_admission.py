"""Admission: first come first served, and no place lost however a wait ends."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.gateway.admission import Admission
from services.gateway.failures import error_headers
from shared.errors import MoeError
from tests.running import wait_until


class Visitor:
    """Takes a place, holds it until told to go, and remembers how it went."""

    def __init__(self, admission: Admission, entered: list[Visitor]) -> None:
        self.inside = False
        self._leave = asyncio.Event()
        self._admission = admission
        self._entered = entered
        self.task = asyncio.create_task(self._visit(), name="visitor")

    async def _visit(self) -> None:
        async with self._admission.slot():
            self.inside = True
            self._entered.append(self)
            try:
                await self._leave.wait()
            finally:
                self.inside = False

    def leave(self) -> None:
        self._leave.set()


async def settle() -> None:
    """Let every task run until it waits for something that only a test does."""
    for _ in range(10):
        await asyncio.sleep(0)


def errors(visitors: list[Visitor]) -> list[BaseException | None]:
    return [None if v.task.cancelled() else v.task.exception() for v in visitors if v.task.done()]


async def finish(visitors: list[Visitor]) -> None:
    for visitor in visitors:
        visitor.leave()
    await asyncio.gather(*(visitor.task for visitor in visitors), return_exceptions=True)


async def test_places_are_given_in_order_of_arrival() -> None:
    admission, entered = Admission(2, 100, 60), list[Visitor]()
    visitors = [Visitor(admission, entered) for _ in range(8)]
    await settle()
    assert entered == visitors[:2]
    assert (admission.running, admission.waiting) == (2, 6)
    for number in range(8):
        visitors[number].leave()
        await settle()
        assert entered == visitors[: number + 3]
    assert (admission.running, admission.waiting) == (0, 0)


async def test_nobody_overtakes_the_line_when_a_place_becomes_free() -> None:
    admission, entered = Admission(1, 100, 60), list[Visitor]()
    first, second = Visitor(admission, entered), Visitor(admission, entered)
    await settle()
    first.leave()
    late = Visitor(admission, entered)
    await settle()
    assert entered == [first, second]
    await finish([second, late])
    assert entered == [first, second, late]


async def test_whoever_leaves_the_line_gives_its_turn_to_the_next() -> None:
    admission, entered = Admission(1, 100, 60), list[Visitor]()
    first, second, third = (Visitor(admission, entered) for _ in range(3))
    await settle()
    second.task.cancel()
    await settle()
    assert admission.waiting == 1
    first.leave()
    await settle()
    assert entered == [first, third]
    await finish([third])
    assert admission.running == 0


async def test_a_place_given_to_someone_who_leaves_at_that_moment_is_passed_on() -> None:
    admission, entered = Admission(1, 100, 60), list[Visitor]()
    first, second, third = (Visitor(admission, entered) for _ in range(3))
    await settle()
    first.leave()
    await asyncio.sleep(0)
    second.task.cancel()
    await settle()
    assert third.inside
    await finish([first, second, third])
    assert second.task.cancelled()
    assert (admission.running, admission.waiting) == (0, 0)


async def test_someone_who_leaves_the_line_just_before_a_place_is_given_ends_as_cancelled() -> None:
    admission, entered = Admission(1, 100, 60), list[Visitor]()
    first, second, third = (Visitor(admission, entered) for _ in range(3))
    await settle()
    first.leave()
    second.task.cancel()
    await settle()
    assert third.inside
    await finish([first, third])
    assert second.task.cancelled(), errors([second])
    assert (admission.running, admission.waiting) == (0, 0)


async def test_waiting_too_long_is_a_typed_error_and_costs_no_place() -> None:
    admission, entered = Admission(1, 100, 0.05), list[Visitor]()
    first, second = Visitor(admission, entered), Visitor(admission, entered)
    with pytest.raises(MoeError, match="no place became free") as caught:
        await second.task
    assert caught.value.code == "queue_timeout"
    assert (admission.running, admission.waiting) == (1, 0)
    await finish([first])
    assert admission.running == 0
    async with admission.slot():
        assert admission.running == 1


async def test_an_error_inside_frees_the_place() -> None:
    admission = Admission(1, 0, 60)
    with pytest.raises(ZeroDivisionError):
        async with admission.slot():
            raise ZeroDivisionError
    assert admission.running == 0


@pytest.mark.parametrize(
    ("limit", "queued", "count", "fits"), [(2, 3, 5, True), (2, 3, 6, False), (1, 0, 1, True), (1, 0, 2, False)]
)
def test_a_request_that_would_overflow_the_line_is_refused_at_once(
    limit: int, queued: int, count: int, *, fits: bool
) -> None:
    admission = Admission(limit, queued, 60)
    if fits:
        admission.check(count)
    else:
        with pytest.raises(MoeError) as caught:
            admission.check(count)
        assert caught.value.code == "overloaded"
        assert caught.value.status == 429


async def test_those_inside_and_in_line_count_against_the_limit() -> None:
    admission, entered = Admission(1, 2, 60), list[Visitor]()
    visitors = [Visitor(admission, entered) for _ in range(2)]
    await settle()
    admission.check(1)
    with pytest.raises(MoeError):
        admission.check(2)
    await finish(visitors)


async def test_requests_that_come_at_the_same_moment_do_not_overflow_the_line_together() -> None:
    admission = Admission(1, 2, 60)
    inside = asyncio.Event()
    refused = 0

    async def arrive() -> None:
        nonlocal refused
        try:
            admission.check(1)
            await asyncio.sleep(0)  # as an endpoint does: its generations are tasks of their own
            async with admission.slot():
                await inside.wait()
        except MoeError:
            refused += 1

    tasks = [asyncio.create_task(arrive(), name="arrive") for _ in range(20)]
    await settle()
    waiting = admission.waiting
    inside.set()
    await asyncio.gather(*tasks)
    assert waiting <= 2
    assert refused == 17


@settings(max_examples=200)
@example(limit=2, present=3, steps=[("arrive", 0), ("leave", 0), ("leave", 1), ("arrive", 0), ("cancel", 2)])
@given(
    limit=st.integers(1, 4),
    present=st.integers(0, 8),
    steps=st.lists(
        st.tuples(st.sampled_from(["arrive", "leave", "cancel", "settle", "tick"]), st.integers(0, 20)), max_size=60
    ),
)
async def test_no_place_is_lost_or_given_twice_whatever_happens(
    limit: int, present: int, steps: list[tuple[str, int]]
) -> None:
    admission, entered = Admission(limit, 1000, 60), list[Visitor]()
    visitors = [Visitor(admission, entered) for _ in range(present)]
    await settle()
    try:
        for action, number in steps:
            if action == "arrive":
                visitors.append(Visitor(admission, entered))
            elif action == "settle":
                await settle()
            elif action == "tick":
                await asyncio.sleep(0)
            elif visitors:
                visitor = visitors[number % len(visitors)]
                visitor.leave() if action == "leave" else visitor.task.cancel()
            assert sum(v.inside for v in visitors) <= limit
        await settle()
        inside = sum(v.inside for v in visitors)
        assert admission.running == inside
        assert not admission.waiting or inside == limit, "somebody waits although a place is free"
        # Of two that were given places at the same moment either may move first; who still waits came after both.
        waiting = [n for n, v in enumerate(visitors) if not v.task.done() and v not in entered]
        assert max([visitors.index(v) for v in entered], default=0) < min(waiting, default=10**6), "somebody overtook"
    finally:
        await finish(visitors)
    assert not [error for error in errors(visitors) if error], "an error escaped"
    assert (admission.running, admission.waiting) == (0, 0)


async def test_many_waits_that_end_by_timeout_lose_no_place() -> None:
    admission, entered = Admission(3, 1000, 0.02), list[Visitor]()
    visitors = [Visitor(admission, entered) for _ in range(60)]
    await wait_until(lambda: sum(v.task.done() for v in visitors) == 57, "all in line to give up", 10)
    assert (admission.running, admission.waiting) == (3, 0)
    assert {type(error) for error in errors(visitors)} == {MoeError}
    await finish(visitors)
    assert admission.running == 0


async def test_a_request_joins_with_all_its_generations_or_not_at_all() -> None:
    admission = Admission(1, 2, 60)
    first = admission.join(3)
    assert (admission.running, admission.waiting) == (1, 2)
    with pytest.raises(MoeError):
        admission.join(1)
    assert (admission.running, admission.waiting) == (1, 2)
    for place in reversed(first):
        place.leave()
        place.leave()
    assert (admission.running, admission.waiting) == (0, 0)


async def test_whoever_would_wait_for_too_long_is_refused_at_once_and_told_when_to_come_back() -> None:
    admission, entered = Admission(1, 1000, 60, max_queue_seconds=0.1), list[Visitor]()
    inside = Visitor(admission, entered)
    await asyncio.sleep(0.2)  # nobody has left for so long
    with pytest.raises(MoeError, match="are waiting, for about") as caught:
        admission.check(1)
    assert caught.value.code == "overloaded"
    assert caught.value.retry_after_seconds > 0.1
    assert int(error_headers(caught.value)["Retry-After"]) >= 1
    await finish([inside])
    admission.check(1)


async def test_a_request_of_many_generations_does_not_wait_for_itself() -> None:
    admission, entered = Admission(1, 1000, 60, max_queue_seconds=0.1), list[Visitor]()
    for _ in range(3):  # what one place takes is known by now, and it is too much for a line of ten
        visitor = Visitor(admission, entered)
        await asyncio.sleep(0.05)
        await finish([visitor])
    for place in admission.join(10):
        place.leave()
    assert (admission.running, admission.waiting) == (0, 0)


@pytest.mark.parametrize(("seconds", "said"), [(0, "1"), (0.4, "1"), (3.01, "4"), (1e9, "60"), (float("inf"), "60")])
def test_retry_after_is_whole_seconds(seconds: float, said: str) -> None:
    error = MoeError("overloaded", "full", retry_after_seconds=seconds)
    assert error_headers(error) == {"Retry-After": said}
    assert not error_headers(MoeError("invalid_request", "wrong", retry_after_seconds=seconds))
