"""Who is refused: a service of so many places under load, with a simulated clock."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from services.gateway.shedding import LASTING_SHARE, Shedding

MAX_WAIT = 5.0


@dataclass
class Service:
    """Places and a line before them, served in order of arrival; time is what `run` says it is."""

    places: int
    stay: Callable[[], float]
    """Draws how long the next one stays."""
    shedding: Shedding = field(init=False)
    line: deque[float] = field(default_factory=deque)
    inside: list[tuple[float, float]] = field(default_factory=list)
    """(ends, began)"""
    waits: list[tuple[float, float]] = field(default_factory=list)
    """(arrived, waited) of everybody who got a place."""
    refused: list[float] = field(default_factory=list)
    busy: float = 0.0
    """Seconds of places."""
    idle_refusals: int = 0

    def __post_init__(self) -> None:
        self.shedding = Shedding(self.places, MAX_WAIT)

    def enter(self, now: float, arrived: float) -> None:
        self.inside.append((now + self.stay(), now))
        self.waits.append((arrived, now - arrived))

    def advance(self, until: float) -> None:
        while self.inside and min(self.inside)[0] <= until:
            ends, began = min(self.inside)
            self.inside.remove((ends, began))
            self.busy += ends - began
            if self.line:
                self.shedding.passed_on(ends, began)
                self.enter(ends, self.line.popleft())
            else:
                self.shedding.freed(ends, began)

    def arrive(self, now: float) -> None:
        self.advance(now)
        if self.shedding.refuses(now, len(self.line)):
            self.refused.append(now)
            self.idle_refusals += len(self.inside) < self.places
            return
        if len(self.inside) < self.places:
            self.shedding.took(now)
            self.enter(now, now)
        else:
            self.line.append(now)


def load(service: Service, rate: float, start: float, seconds: float, seed: int) -> None:
    """Poisson arrivals."""
    draw = random.Random(seed)
    now = start
    while (now := now + draw.expovariate(rate)) < start + seconds:
        service.arrive(now)
    service.advance(start + seconds)


def exponential(mean: float, seed: int) -> Callable[[], float]:
    draw = random.Random(seed)
    return lambda: draw.expovariate(1 / mean)


def short_or_long(seed: int) -> Callable[[], float]:
    draw = random.Random(seed)
    return lambda: 0.2 if draw.random() < 0.8 else 4.2


STAYS: dict[str, Callable[[int], Callable[[], float]]] = {
    "exponential": lambda seed: exponential(1.0, seed),
    "always the same": lambda _seed: lambda: 1.0,
    "short or long": short_or_long,
}


CROWDS = [(places, stay) for places in (1, 4, 64) for stay in STAYS if (places, stay) != (1, "short or long")]
"""Behind one place, a few long stays are a long wait, whatever is expected."""


@pytest.mark.parametrize(("places", "stay"), CROWDS)
@pytest.mark.parametrize("seed", range(3))
def test_five_times_the_capacity(places: int, stay: str, seed: int) -> None:
    service = Service(places, STAYS[stay](seed))
    load(service, 5 * places, 0, 120, seed)
    assert not service.idle_refusals
    lasting = [waited for arrived, waited in service.waits if arrived > 4 * MAX_WAIT]
    allowed = max(LASTING_SHARE * MAX_WAIT, 1 / places)
    assert sum(lasting) / len(lasting) < 2.5 * allowed, "accepted ones keep their latency in lasting overload"
    assert max(waited for _, waited in service.waits) < 3 * MAX_WAIT, "and the burst before is bounded"
    assert service.busy > 0.9 * places * 120, "no place is idle while some are refused"
    assert len(service.refused) > 3 * places * 120
    # And after it, all is as before.
    before = len(service.refused)
    load(service, 0.5 * places, 180, 60, seed)
    if places > 1:
        assert len(service.refused) == before


@pytest.mark.parametrize(("places", "share"), [(4, 0.1), (16, 0.01), (64, 0)])
def test_at_four_fifths_of_the_capacity_few_are_refused_and_of_many_places_none(places: int, share: float) -> None:
    service = Service(places, exponential(1.0, 5))
    load(service, 0.8 * places, 0, 600, 5)
    assert len(service.refused) <= share * len(service.waits)
    assert not service.idle_refusals


@pytest.mark.parametrize("places", [4, 64])
def test_what_was_learnt_under_load_is_what_the_service_can_do_not_what_was_asked_of_it(places: int) -> None:
    service = Service(places, exponential(0.2, 1))
    load(service, 2 * 5 * places, 0, 20, 1)
    load(service, 0.02 * places, 100, 600, 2)  # a quiet time: few places become free as few are taken
    before = len(service.refused)
    for _ in range(places + 10 * places):  # a burst that takes two seconds
        service.arrive(800)
    assert len(service.refused) == before


def test_a_burst_on_a_service_that_has_served_nobody_is_let_in() -> None:
    service = Service(4, lambda: 1.0)
    for _ in range(100):
        service.arrive(0)
    assert not service.refused


def test_a_service_that_serves_nobody_lets_ever_fewer_wait() -> None:
    lengths = []
    for seconds in (0.5, 2, 8, 32):
        shedding = Shedding(4, MAX_WAIT)
        for _ in range(4):
            shedding.took(0)
        ahead = 0
        while ahead < 1000 and not shedding.refuses(seconds, ahead):
            ahead += 1
        lengths.append(ahead)
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 10
    assert lengths[-1] == 0


def test_an_outage_is_noticed_by_those_who_come_after() -> None:
    service = Service(8, exponential(0.2, 3))
    load(service, 200, 0, 20, 3)
    waits = [service.shedding.expected_wait(20 + silence, 3) for silence in (0, 1, 5, 20, 60)]
    assert waits == sorted(waits)
    assert waits[0] < 0.5
    assert waits[-1] > MAX_WAIT


def test_the_expected_wait_is_the_real_one() -> None:
    service = Service(16, exponential(0.8, 4))
    load(service, 60, 0, 60, 4)
    assert service.shedding.expected_wait(60, 39) == pytest.approx(40 / (16 / 0.8), rel=0.25)


def test_while_a_place_is_free_nobody_is_refused_and_nobody_waits() -> None:
    shedding = Shedding(2, 0.001)
    shedding.took(0)
    assert not shedding.refuses(1000, 0)
    assert shedding.expected_wait(1000, 0) == 0
    shedding.took(1)
    assert shedding.refuses(1000, 0)
    shedding.freed(1000, 0)
    assert not shedding.refuses(1000, 0)


def test_one_may_wait_in_lasting_overload_even_where_places_are_slow() -> None:
    shedding = Shedding(1, MAX_WAIT)
    shedding.took(0)
    for now in range(20):
        shedding.passed_on(now + 1, now)
    assert not shedding.refuses(20, 0), "one stay is two tenths of the longest wait"
    assert shedding.refuses(20, 1)
