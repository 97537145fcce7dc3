"""Which tokens are computed in the next step. A pure core: no clock, no I/O, no tensors.

Continuous batching (Orca, OSDI 2022) with chunked prefill (Sarathi, arXiv 2308.16369) and paged blocks (vLLM,
arXiv 2309.06180). Every running sequence decodes in every step; prompts share the step's budget evenly, so a long one
holds up no short one. Admission is by free blocks, in order of arrival; a request that does not fit is passed over by
smaller ones, but not for ever.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from services.router.kv_cache import BlockPool
from services.router.prefill_pace import PrefillPace
from services.router.sequence import Sequence

MAX_PASSED_OVER = 16


@dataclass(frozen=True)
class Work:
    """Compute `count` tokens of `sequence` from position `start`."""

    sequence: Sequence
    start: int
    count: int

    @property
    def completes(self) -> bool:
        """Whether a next token can be chosen after it."""
        return self.start + self.count == self.sequence.length


class Scheduler:
    """Owns the waiting line, the running set and the blocks."""

    def __init__(self, pool: BlockPool, *, batch_size: int, prefill_chunk_tokens: int, max_waiting: int) -> None:
        self.pace = PrefillPace(prefill_chunk_tokens)
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._batch_size = batch_size
        self._max_waiting = max_waiting

    @property
    def full(self) -> bool:
        return len(self.waiting) >= self._max_waiting

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, sequence: Sequence) -> None:
        """Put it in line: at the end, or at the head if it has tokens already, which another router has made."""
        if sequence.output:
            self.waiting.appendleft(sequence)
        else:
            self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is; its blocks are free at once."""
        self._release(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def expired(self, now: float) -> list[Sequence]:
        """Sequences in line whose deadline has passed."""
        return [s for s in self.waiting if s.deadline is not None and now > s.deadline]

    def schedule(self, now: float) -> list[Work]:
        """The next step's work, decodes first. Takes the blocks it needs; preempts the latest arrivals if it must."""
        self._admit(now)
        decoding = sorted((s for s in self.running if s.pending == 1), key=lambda s: s.arrival)
        prefilling = sorted((s for s in self.running if s.pending > 1), key=lambda s: s.arrival)
        work = [Work(s, s.computed, 1) for s in decoding if s in self.running and self._grow(s, s.length)]
        budget = self.pace.budget(decoding=len(work), prefilling=len(prefilling))
        shares = _share([s.pending for s in prefilling], budget)
        for sequence, share in zip(prefilling, shares, strict=True):
            if share and sequence in self.running:
                work.append(Work(sequence, sequence.computed, share))
        # A decode that grew later may have preempted one that was already planned.
        work = [w for w in work if w.sequence in self.running]
        return sorted(work, key=lambda w: w.count > 1)

    def _admit(self, now: float) -> None:
        index = 0
        while index < len(self.waiting) and len(self.running) < self._batch_size:
            sequence = self.waiting[index]
            needed = self.pool.blocks_for(sequence.length + 1)
            # Keep a block for each running sequence, or admitting would preempt at once.
            spare = self.pool.free - len(self.running) if self.running else self.pool.free
            blocks = self.pool.take(needed) if needed <= spare else None
            if blocks is None:
                if sequence.passed_over >= MAX_PASSED_OVER:
                    return
                index += 1
                continue
            passed = list(self.waiting)[:index]
            for earlier in passed:
                earlier.passed_over += 1
            del self.waiting[index]
            sequence.blocks = blocks
            sequence.admitted = now if sequence.admitted is None else sequence.admitted
            self.running.append(sequence)
            if any(earlier.passed_over >= MAX_PASSED_OVER for earlier in passed):
                return

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Make `sequence` have blocks for `tokens` tokens, preempting the latest arrivals; False if it is preempted."""
        while (missing := self.pool.blocks_for(tokens) - len(sequence.blocks)) > 0:
            blocks = self.pool.take(missing)
            if blocks is not None:
                sequence.blocks += blocks
                return True
            victim = max(self.running, key=lambda s: s.arrival)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Send it back to the head of the line; its tokens are kept, its keys and values computed again."""
        self.preemptions += 1
        self._release(sequence)
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.give_back(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0


def _share(pending: list[int], budget: int) -> list[int]:
    """Split `budget` tokens among sequences with `pending` tokens each: evenly, leftovers to the first."""
    shares = [0] * len(pending)
    while budget > 0:
        open_ = [i for i, tokens in enumerate(pending) if shares[i] < tokens]
        if not open_:
            break
        even = max(1, budget // len(open_))
        for i in open_:
            share = min(even, pending[i] - shares[i], budget)
            shares[i] += share
            budget -= share
    return shares
