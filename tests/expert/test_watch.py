"""The watch over the other workers: who is lost, when, and who takes over; with a simulated clock and bus."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.expert.watch import (
    ANSWER_SECONDS,
    DEAF_SECONDS,
    DOUBT_SECONDS,
    FORGET_SECONDS,
    RETURN_SECONDS,
    SILENT_SECONDS,
    UNCLAIMED_SECONDS,
    Loss,
    Watch,
)
from shared.status import State, Status

STEP = 0.1
START = 100.0


def worker(name: str, *shards: int, state: State = "ready", wanted: tuple[int, ...] = ()) -> Status:
    return Status(service="expert", instance=name, state=state, shards=shards, wanted_shards=wanted)


ME = worker("me", 0)


@dataclass
class Looking:
    """A watch, its clock, and reports that come when a test says so; ours come each second by themselves."""

    watch: Watch = field(default_factory=lambda: Watch("me"))
    now: float = START
    reports: dict[str, tuple[float, Status]] = field(default_factory=dict)
    hears_itself: bool = True
    connection: int | None = 0
    asked: list[str] = field(default_factory=list)
    echo: bool = True
    """Whether a probe of ourselves comes back."""

    def hear(self, *statuses: Status) -> None:
        self.reports.update({s.instance: (self.now, s) for s in statuses})

    def look(self) -> list[str]:
        if self.hears_itself:
            self.hear(ME)
        found = self.watch.look(self.now, self.reports.values(), connection=self.connection)
        self.asked += found
        if "me" in found:
            if self.echo:
                self.watch.answered("me", self.now + 0.001)
            else:
                self.watch.unanswered("me")
        return [instance for instance in found if instance != "me"]

    def until(self, seconds: float) -> list[str]:
        """Look every STEP until `seconds` after the start; whom it asked."""
        found = []
        while self.now < START + seconds - 1e-9:
            self.now = min(self.now + STEP, START + seconds)
            found += self.look()
        return found

    def losses(self, num_shards: int = 2, *, needed: bool = True, me: Status = ME) -> list[Loss]:
        return self.watch.losses(me, num_shards, self.now, needed=needed)


@pytest.fixture
def looking() -> Looking:
    """One other worker, with shard 1, was heard of just now."""
    made = Looking()
    made.look()
    made.hear(worker("other", 1))
    made.look()
    return made


def test_who_reports_each_second_is_never_asked(looking: Looking) -> None:
    for second in range(1, 20):
        assert looking.until(second) == []
        looking.hear(worker("other", 1))
    assert looking.losses() == []


def test_the_overdue_are_asked_once_at_a_time(looking: Looking) -> None:
    assert looking.until(DOUBT_SECONDS) == []
    assert looking.until(DOUBT_SECONDS + 0.3) == ["other"]
    looking.watch.unanswered("other")
    assert looking.until(DOUBT_SECONDS + 0.4) == ["other"]


def test_whom_the_server_does_not_know_is_gone_at_once(looking: Looking) -> None:
    looking.until(DOUBT_SECONDS + STEP)
    looking.watch.absent("other")
    assert looking.losses() == [Loss(1, "gone", "other", START)]
    assert looking.watch.workers() == []
    assert looking.until(DOUBT_SECONDS + 1) == [], "what is known is not asked"


def test_who_answers_nothing_is_stalled_after_a_while(looking: Looking) -> None:
    looking.until(SILENT_SECONDS)
    assert looking.losses() == []
    looking.until(SILENT_SECONDS + 3 * STEP)
    assert looking.losses() == [Loss(1, "stalled", "other", START)]


def test_who_answers_lives_however_late_the_report(looking: Looking) -> None:
    for _ in range(50):
        for instance in looking.until(looking.now - START + 0.3):
            looking.watch.answered(instance, looking.now)
        assert looking.losses() == []
    assert "other" in looking.asked


def test_a_late_answer_or_report_undoes_the_verdict(looking: Looking) -> None:
    looking.until(3)
    assert looking.losses()
    looking.watch.answered("other", looking.now)
    assert looking.losses() == []
    looking.until(6)
    assert looking.losses()
    looking.hear(worker("other", 1))
    looking.look()
    assert looking.losses() == []


def test_a_report_that_crossed_the_probe_counts(looking: Looking) -> None:
    looking.until(DOUBT_SECONDS + STEP)
    looking.now += 0.01
    looking.hear(worker("other", 1))
    looking.look()
    looking.watch.absent("other")  # asked before the report came
    assert looking.losses() == []


def test_nobody_is_stalled_while_nothing_of_ours_comes_back_either(looking: Looking) -> None:
    """NATS stands still: the last own report is newer than the other's, which says nothing."""
    looking.until(0.9)
    looking.hears_itself = looking.echo = False
    looking.until(10)
    assert looking.losses() == []
    looking.hears_itself = looking.echo = True
    looking.until(10.4)
    assert looking.losses() == [], "just now we hear again"


def test_who_hears_not_even_itself_declares_nobody_lost(looking: Looking) -> None:
    looking.hears_itself = False
    looking.until(DEAF_SECONDS)
    looking.asked.clear()
    looking.until(30)
    assert looking.asked == []
    assert looking.losses() == []


def test_after_a_reconnect_the_others_have_time_to_come_back(looking: Looking) -> None:
    looking.connection = None
    looking.until(4)
    looking.connection = 1
    assert looking.until(4 + RETURN_SECONDS) == []
    assert looking.losses() == []
    assert looking.until(4 + RETURN_SECONDS + 2 * STEP) == ["other"]


def test_a_reconnect_between_two_looks_is_noticed(looking: Looking) -> None:
    looking.until(1)
    looking.connection = 1
    assert looking.until(RETURN_SECONDS) == []


def test_who_has_come_back_after_a_reconnect_is_watched_as_ever(looking: Looking) -> None:
    looking.connection = 1
    looking.until(0.5)
    looking.hear(worker("other", 1))
    assert looking.until(0.5 + DOUBT_SECONDS + 2 * STEP) == ["other"]


def test_a_look_that_comes_late_gives_the_answers_time_to_be_read(looking: Looking) -> None:
    looking.until(DOUBT_SECONDS + STEP)
    looking.now += 30  # we were stopped
    looking.look()
    assert looking.losses() == []
    looking.now += ANSWER_SECONDS / 2
    looking.look()
    assert looking.losses() == []
    looking.watch.answered("other", looking.now)
    looking.until(looking.now - START + 0.5)
    assert looking.losses() == []


@pytest.mark.parametrize(("needed", "seconds"), [(True, 0.0), (False, UNCLAIMED_SECONDS)])
def test_who_drains_is_followed_at_once_where_somebody_needs_it(looking: Looking, needed: bool, seconds: float) -> None:
    looking.now += STEP
    looking.hear(worker("other", 1, state="draining"))
    looking.look()
    first = looking.losses(needed=needed)
    assert bool(first) == needed
    for _ in range(40):
        looking.now += STEP
        looking.hear(worker("other", 1, state="draining"))
        looking.look()
        if looking.losses(needed=needed):
            break
    assert looking.now - START == pytest.approx(STEP + max(seconds, STEP), abs=0.2)


def test_a_shard_that_nobody_ever_had_waits_for_its_worker(looking: Looking) -> None:
    def losses() -> list[Loss]:
        looking.hear(worker("other", 1))
        return looking.losses(3)

    assert losses() == []
    for tenth in range(1, 10 * int(UNCLAIMED_SECONDS)):
        looking.until(tenth / 10)
        assert losses() == []
    looking.until(UNCLAIMED_SECONDS + STEP)
    assert losses() == [Loss(2, "unclaimed", "", START)]


def test_what_another_loads_already_is_not_lost(looking: Looking) -> None:
    looking.until(3)
    looking.hear(worker("third", 2, wanted=(1,)))
    looking.look()
    assert looking.losses(3) == []


def test_the_forgotten_are_forgotten(looking: Looking) -> None:
    looking.until(3)
    looking.reports.pop("other")
    looking.until(FORGET_SECONDS + 1)
    assert "other" not in looking.watch._peers


# -- a fleet of them, with a bus that delays and processes that die ----------------------------------------------------


@dataclass
class Process:
    """A worker of the simulation: its watch, what it serves, and how it fares."""

    name: str
    shards: set[int]
    watch: Watch
    next_report: float
    wanted: dict[int, float] = field(default_factory=dict)
    """Shards under way, and when each is loaded."""
    stopped: float = math.inf
    """SIGSTOP: it says nothing from then on, but NATS knows it still."""
    killed: float = math.inf
    took: list[tuple[float, Loss]] = field(default_factory=list)

    def runs(self, now: float) -> bool:
        return now < min(self.stopped, self.killed)

    def status(self) -> Status:
        return worker(self.name, *sorted(self.shards), wanted=tuple(sorted(self.wanted)))


class Simulation:
    """`count` workers with a shard each; reports, probes and answers take random times to arrive, up to `delay`."""

    def __init__(self, seed: int, count: int, delay: float) -> None:
        self.random = Random(seed)
        self.delay = delay
        self.now = 0.0
        self.fleet = [Process(f"w{n}", {n}, Watch(f"w{n}"), self.random.random()) for n in range(count)]
        self.num_shards = count
        self.mail: list[tuple[float, int, str, str, object]] = []
        self.heard: dict[str, dict[str, tuple[float, Status]]] = {p.name: {} for p in self.fleet}
        self.order = itertools.count()

    def send(self, to: str, what: str, value: object, delay: float | None = None) -> None:
        due = self.now + (self.random.uniform(0, self.delay) if delay is None else delay)
        self.mail.append((due, next(self.order), to, what, value))

    def process(self, name: str) -> Process:
        return next(p for p in self.fleet if p.name == name)

    def step(self) -> None:
        self.now = round(self.now + STEP, 6)
        for each in sorted(m for m in self.mail if m[0] <= self.now):
            self.mail.remove(each)
            self.deliver(*each[2:])
        for process in self.fleet:
            if process.runs(self.now):
                self.turn(process)

    def deliver(self, to: str, what: str, value: object) -> None:
        process = self.process(to)
        if what == "probe":
            asker = str(value)
            if self.now >= process.killed:
                self.send(asker, "absent", to)
            elif self.now < process.stopped:
                self.send(asker, "answered", to)
            else:
                self.send(asker, "unanswered", to, delay=2.0)
        elif not process.runs(self.now):
            return
        elif what == "report":
            assert isinstance(value, Status)
            self.heard[to][value.instance] = (self.now, value)
        elif what == "answered":
            process.watch.answered(str(value), self.now)
        elif what == "absent":
            process.watch.absent(str(value))
        else:
            process.watch.unanswered(str(value))

    def report(self, process: Process) -> None:
        process.next_report = self.now + 1 + self.random.uniform(0, 0.2)
        for other in self.fleet:
            self.send(other.name, "report", process.status())

    def turn(self, process: Process) -> None:
        for shard in [s for s, ready in process.wanted.items() if ready <= self.now]:
            del process.wanted[shard]
            process.shards.add(shard)
            self.report(process)
        if self.now >= process.next_report:
            self.report(process)
        for name in process.watch.look(self.now, self.heard[process.name].values(), connection=0):
            self.send(name, "probe", process.name)
        if not process.wanted:
            for loss in process.watch.losses(process.status(), self.num_shards, self.now, needed=True):
                process.took.append((self.now, loss))
                process.wanted[loss.shard] = self.now + self.random.uniform(0.2, 4)
            if process.wanted:
                self.report(process)


@settings(max_examples=150)
@given(st.integers(0, 2**32), st.integers(2, 5), st.floats(0.001, 0.2), st.booleans(), st.floats(0, 1))
def test_a_lost_shard_is_taken_over_within_three_seconds(
    seed: int, count: int, delay: float, killed: bool, moment: float
) -> None:
    s = Simulation(seed, count, delay)
    while s.now < 5 + moment:
        s.step()
    assert not any(p.took for p in s.fleet), "all live"
    victim = s.random.choice(s.fleet)
    died = s.now
    if killed:
        victim.killed = died
    else:
        victim.stopped = died
    (shard,) = victim.shards
    while s.now < died + 12:
        s.step()
    living = [p for p in s.fleet if p is not victim]
    took = [(when, loss) for p in living for when, loss in p.took]
    assert min(when for when, _ in took) - died <= 3.0
    assert {loss.shard for _, loss in took} == {shard}
    assert {loss.reason for _, loss in took} == {"gone" if killed else "stalled"}
    assert sum(shard in p.shards for p in living) == 1, "one and no more"


@settings(max_examples=50)
@given(st.integers(0, 2**32), st.integers(2, 5), st.floats(0.001, 0.24))
def test_nobody_is_lost_while_all_answer(seed: int, count: int, delay: float) -> None:
    s = Simulation(seed, count, delay)
    slow = s.random.choice(s.fleet)
    while s.now < 60:
        if s.now > 5 and s.random.random() < 0.02:
            slow.next_report += 3  # its reports are late, its answers are not
        s.step()
        assert not any(p.took for p in s.fleet)


def test_a_worker_that_is_lost_too_takes_nothing() -> None:
    s = Simulation(7, 3, 0.01)
    while s.now < 5:
        s.step()
    s.fleet[1].killed = s.fleet[2].stopped = s.now
    while s.now < 20:
        s.step()
    assert s.fleet[0].shards == {0, 1, 2}
