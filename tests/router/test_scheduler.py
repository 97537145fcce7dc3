"""The scheduler under random mixes of requests: no block lost or given twice, nobody starved, budgets respected."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import event, given, settings
from hypothesis import strategies as st

from services.router.kv_cache import BlockPool
from services.router.messages import GenerateRequest
from services.router.scheduler import MAX_PASSED_OVER, Scheduler, Work, _share
from services.router.sequence import Sequence

BLOCK_TOKENS = 4


@dataclass(frozen=True)
class Plan:
    """One request of a mix: when it comes, how long it is, and when it is cancelled, if it is."""

    arrives: int
    prompt: int
    new: int
    cancelled: int | None


@dataclass
class Simulation:
    """Runs a scheduler without a model: every token is chosen at once, and the rules are checked at every step."""

    scheduler: Scheduler
    blocks: int
    batch_size: int
    chunk: int
    alive: dict[str, Sequence] = field(default_factory=dict)
    finished: list[str] = field(default_factory=list)
    step: int = 0

    def submit(self, name: str, prompt: int, new: int) -> Sequence:
        request = GenerateRequest(id=name, token_ids=[1] * prompt, max_tokens=new, ignore_eos=True)
        sequence = self.alive[name] = Sequence(request, arrival=float(self.step))
        self.scheduler.add(sequence)
        return sequence

    def cancel(self, name: str) -> None:
        self.scheduler.remove(self.alive.pop(name))
        self.finished.append(name)
        self.check_blocks()

    def run_step(self) -> list[Work]:
        line = list(self.scheduler.waiting)
        decoding = [s for s in self.scheduler.running if s.pending == 1]
        work = self.scheduler.schedule(float(self.step))
        self.step += 1
        self.check_blocks()
        self.check_admissions(line)
        self.check_work(work, decoding)
        for w in work:
            s = w.sequence
            s.computed = w.start + w.count
            if w.completes:
                reason, _ = s.append(1)
                if reason:
                    self.scheduler.remove(s)
                    self.finished.append(s.request.id)
                    del self.alive[s.request.id]
        self.check_blocks()
        return work

    def check_blocks(self) -> None:
        scheduler = self.scheduler
        held = [block for s in self.alive.values() for block in s.blocks]
        assert Counter(held) + Counter(scheduler.pool._free) == Counter(range(1, self.blocks + 1))
        assert {*scheduler.running, *scheduler.waiting} == {*self.alive.values()}
        assert len(scheduler.running) + len(scheduler.waiting) == len(self.alive)
        assert not any(s.blocks or s.computed for s in scheduler.waiting)

    def check_admissions(self, line: list[Sequence]) -> None:
        """In order of arrival; only what needs fewer blocks than somebody before it may pass that one over."""
        admitted = [s for s in line if s in self.scheduler.running]
        needed = {s: -(-(s.length + 1) // BLOCK_TOKENS) for s in line}
        for s in admitted:
            earlier = line[: line.index(s)]
            assert all(needed[other] > needed[s] for other in earlier if other not in admitted)
        assert len(self.scheduler.running) <= self.batch_size
        assert all(s.passed_over <= MAX_PASSED_OVER + self.batch_size for s in line)

    def check_work(self, work: list[Work], decoding: list[Sequence]) -> None:
        running = self.scheduler.running
        assert work or not self.alive, "nothing runs although somebody waits"
        assert len({w.sequence for w in work}) == len(work)
        assert all(w.sequence in running and w.start == w.sequence.computed and w.count > 0 for w in work)
        assert all(len(w.sequence.blocks) * BLOCK_TOKENS >= w.start + w.count for w in work)
        assert [w.count > 1 for w in work] == sorted(w.count > 1 for w in work), "single tokens come first"
        # A decode is skipped only when its sequence was sent back to the line.
        assert {s for s in decoding if s in running} <= {w.sequence for w in work}
        assert sum(w.count for w in work if w.sequence.pending > 1) <= self.chunk
        oldest = min((s.arrival for s in running), default=0.0)
        assert not running or any(w.sequence.arrival == oldest for w in work), "the oldest always move on"


def simulation(blocks: int, batch_size: int, chunk: int) -> Simulation:
    scheduler = Scheduler(
        BlockPool(blocks, BLOCK_TOKENS), batch_size=batch_size, prefill_chunk_tokens=chunk, max_waiting=1000
    )
    return Simulation(scheduler, blocks, batch_size, chunk)


@st.composite
def mixes(draw: st.DrawFn) -> tuple[int, int, int, list[Plan]]:
    """(blocks, batch size, chunk, requests that each fit into the blocks by themselves)."""
    blocks = draw(st.integers(2, 24))
    most = blocks * BLOCK_TOKENS - 1
    plans = []
    for _ in range(draw(st.integers(1, 25))):
        prompt = draw(st.integers(1, most - 1))
        new = draw(st.integers(1, most - prompt))
        plans.append(Plan(draw(st.integers(0, 30)), prompt, new, draw(st.none() | st.integers(1, 40))))
    return blocks, draw(st.integers(1, 10)), draw(st.integers(1, 32)), plans


@settings(max_examples=250, deadline=None)
@given(mixes())
def test_every_request_of_a_random_mix_ends_and_no_rule_is_broken(mix: tuple[int, int, int, list[Plan]]) -> None:
    blocks, batch_size, chunk, plans = mix
    s = simulation(blocks, batch_size, chunk)
    # The oldest running sequence is never sent back, so that some token is final in each step but those of recomputing.
    limit = 100 + 4 * sum(plan.prompt + plan.new for plan in plans)
    while s.alive or s.step <= max(plan.arrives for plan in plans):
        assert s.step < limit, "a request never ends"
        for number, plan in enumerate(plans):
            if plan.arrives == s.step:
                s.submit(str(number), plan.prompt, plan.new)
        for number, plan in enumerate(plans):
            if plan.cancelled is not None and plan.arrives + plan.cancelled == s.step and str(number) in s.alive:
                s.cancel(str(number))
        s.run_step()
    assert sorted(s.finished) == sorted(str(number) for number in range(len(plans)))
    assert s.scheduler.pool.free == blocks
    assert s.scheduler.idle
    event("preempted" if s.scheduler.preemptions else "never preempted")


def test_a_large_request_is_admitted_although_small_ones_keep_coming() -> None:
    s = simulation(blocks=16, batch_size=8, chunk=64)
    for number in range(2):
        s.submit(f"first-{number}", 8, 6)
    s.run_step()
    large = s.submit("large", 50, 2)
    for number in range(400):
        s.submit(f"small-{number}", 3, 3)
        s.run_step()
        if large in s.scheduler.running:
            break
    assert large in s.scheduler.running
    assert large.passed_over > 0, "no small one passed it: the test shows nothing"


def test_no_request_is_passed_over_more_often_than_the_rule_says() -> None:
    s = simulation(blocks=100, batch_size=64, chunk=1000)
    s.submit("running", 200, 40)
    s.run_step()
    large = s.submit("large", 250, 2)
    for number in range(40):
        s.submit(f"small-{number}", 2, 40)
    s.run_step()
    assert large in s.scheduler.waiting
    assert large.passed_over <= MAX_PASSED_OVER


def test_requests_of_one_size_are_admitted_in_order_of_arrival() -> None:
    s = simulation(blocks=6, batch_size=3, chunk=64)
    for number in range(9):
        s.submit(str(number), 5, 3)
    while s.alive:
        s.run_step()
    assert s.finished == [str(number) for number in range(9)]


def test_lack_of_blocks_sends_the_latest_arrival_back_and_keeps_its_tokens() -> None:
    s = simulation(blocks=6, batch_size=4, chunk=64)
    old = s.submit("old", 8, 15)
    s.run_step()
    young = s.submit("young", 6, 10)
    s.run_step()
    late = s.submit("late", 20, 1)
    while not s.scheduler.preemptions:
        s.run_step()
    assert list(s.scheduler.waiting) == [young, late]
    assert s.scheduler.running == [old]
    kept = list(young.output)
    assert kept
    assert not young.blocks
    while s.alive:
        s.run_step()
    assert s.finished == ["old", "young", "late"]
    assert young.output[: len(kept)] == kept


def test_a_sequence_is_expired_only_while_it_waits() -> None:
    s = simulation(blocks=2, batch_size=1, chunk=8)
    running, waiting, patient = s.submit("a", 2, 3), s.submit("b", 2, 3), s.submit("c", 2, 3)
    running.deadline = waiting.deadline = 5.0
    s.run_step()
    assert s.scheduler.expired(5.0) == []
    assert s.scheduler.expired(5.1) == [waiting]
    assert patient in s.scheduler.waiting


def test_the_line_is_full_at_its_limit() -> None:
    scheduler = Scheduler(BlockPool(4, BLOCK_TOKENS), batch_size=1, prefill_chunk_tokens=8, max_waiting=2)
    for number in range(2):
        assert not scheduler.full
        scheduler.add(Sequence(GenerateRequest(id=str(number), token_ids=[1], max_tokens=1), float(number)))
    assert scheduler.full


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), max_size=12), st.integers(1, 100))
def test_prompts_share_a_steps_tokens_evenly(pending: list[int], budget: int) -> None:
    shares = _share(pending, budget)
    assert sum(shares) == min(budget, sum(pending))
    assert all(0 <= share <= tokens for share, tokens in zip(shares, pending, strict=True))
    # Whoever did not get all it asked for got no less than anybody else, but for the one token of an uneven split.
    hungry = [share for share, tokens in zip(shares, pending, strict=True) if share < tokens]
    assert not hungry or max(shares) - min(hungry) <= 1
