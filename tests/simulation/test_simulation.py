"""Seeded runs of a whole fleet with faults; that a seed replays exactly; and that the checks see what goes wrong."""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

import msgspec
import pytest
import torch

from services.gateway import liveness
from services.gateway.generation import Generator
from services.gateway.liveness import Liveness
from services.gateway.progress import Progress
from services.router import dispatch
from services.router.kv_cache import BlockPool
from services.router.messages import GenerateChunk, GenerateRequest
from services.router.sequence import Sequence
from shared.bus import ReplyStream
from shared.retry_budget import RetryBudget
from tests.simulation.numerics import SimulatedBank
from tests.simulation.run import describe
from tests.simulation.world import Report, simulate

RUNS = 100
CHUNK = 20


@pytest.mark.parametrize("first", range(0, RUNS, CHUNK))
def test_no_token_block_or_task_is_lost_whatever_fails(first: int) -> None:
    met: Counter[str] = Counter()
    for seed in range(first, first + CHUNK):
        report = simulate(seed)
        assert not report.violations, describe(report)
        met += report.counts
        met.update(report.outcomes.values())
    assert met["ok"] > CHUNK
    assert met["generation.resumed"], "no stream lost its router: these runs prove little"
    assert met["plan.followed"], "no router went over to a plan"


@functools.cache
def eventful() -> Report:
    """A run in which a stream lost its router."""
    return next(report for seed in itertools.count() if (report := simulate(seed)).counts["generation.resumed"])


def test_a_seed_replays_exactly() -> None:
    seed = eventful().seed
    once, again = simulate(seed, trace=True), simulate(seed, trace=True)
    assert once.trace == again.trace
    assert once.digest == again.digest == eventful().digest
    assert once.digest != simulate(seed + 1).digest


def test_a_seed_replays_exactly_in_another_process() -> None:
    report = eventful()
    command = [sys.executable, "-m", "tests.simulation.run", "--seed", str(report.seed)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        command, cwd=root, env=os.environ | {"PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True
    )
    assert f"digest {report.digest:08x}" in done.stdout
    assert str(report.outcomes) in done.stdout


# -- the checks themselves: each of these breaks the code in one place, and a run must say so -------------------------


def violations(target: object, name: str, broken: object, seeds: Iterable[int] = range(60)) -> str:
    """What the first run that complains says, with `target`'s attribute `name` replaced."""
    with mock.patch.object(target, name, broken):
        for seed in seeds:
            report = simulate(seed)
            if report.violations:
                return "\n".join(report.violations)
    return ""


def test_a_leaked_block_is_seen() -> None:
    give_back = BlockPool.give_back

    def leaky(self: BlockPool, blocks: list[int]) -> None:
        give_back(self, blocks[1:])

    assert "blocks leaked" in violations(BlockPool, "give_back", leaky)


def test_a_block_given_twice_is_seen() -> None:
    take = BlockPool.take

    def generous(self: BlockPool, count: int) -> list[int] | None:
        blocks = take(self, count)
        if blocks:
            self.give_back(blocks[:1])
        return blocks

    found = violations(BlockPool, "take", generous)
    assert "leaked or doubled" in found
    assert "holds another's tokens" in found


def test_a_token_that_is_said_twice_is_seen() -> None:
    next_try = Progress.next_try

    def forgetful(self: Progress) -> GenerateRequest:
        request = next_try(self)
        return msgspec.structs.replace(request, output_ids=request.output_ids[:-1])

    def trusting(self: Progress, chunk: GenerateChunk) -> GenerateChunk:
        self.tokens += chunk.token_ids
        return chunk

    with mock.patch.object(Progress, "take", trusting):
        assert "are not the beginning of" in violations(Progress, "next_try", forgetful)


def test_a_token_that_is_left_out_is_seen() -> None:
    take = Progress.take

    def careless(self: Progress, chunk: GenerateChunk) -> GenerateChunk:
        token_ids = [] if chunk.start == 2 else chunk.token_ids
        return take(self, msgspec.structs.replace(chunk, start=len(self.tokens), token_ids=token_ids))

    assert "are not the beginning of" in violations(Progress, "take", careless)


def test_routing_that_is_told_twice_is_seen() -> None:
    found = violations(Progress, "_routing", lambda _self, chunk, _start: chunk.routing, range(200))
    assert "rows of routing are not the" in found


def test_penalties_that_are_not_continued_are_seen() -> None:
    def fresh(self: Sequence) -> None:
        self.output = list(self.request.output_ids)
        self.counts = Counter()

    found = violations(Sequence, "__post_init__", fresh, range(200))
    assert "are not the beginning of" in found or "ends with" in found


def test_a_wrong_sum_of_experts_is_seen() -> None:
    compute = SimulatedBank.compute

    def early(self: SimulatedBank, layer: int, *tensors: torch.Tensor) -> torch.Tensor:
        return compute(self, layer + 1, *tensors)

    assert "the experts' answer is wrong" in violations(SimulatedBank, "compute", early)


def test_a_copy_that_is_not_there_and_is_not_done_without_is_seen() -> None:
    assert "wrong_shard" in violations(dispatch, "AT_HOME", frozenset())


def test_an_inbox_that_is_left_open_is_seen() -> None:
    with mock.patch("tests.simulation.world.SETTLE_SECONDS", 1.0):
        assert "open inboxes" in violations(ReplyStream, "close", lambda _: None)


def test_retries_beyond_the_budget_are_seen() -> None:
    def generous(_self: RetryBudget, _now: float) -> bool:
        return True

    assert "calls sent for" in violations(RetryBudget, "take", generous)


def test_a_router_whose_end_is_noticed_late_is_seen() -> None:
    assert "stands still" in violations(liveness, "SILENT_SECONDS", 5.0, range(400))


def test_a_stream_that_waits_for_ever_is_seen() -> None:
    async def blind(_self: Liveness) -> None:
        return

    found = violations(Liveness, "_look", blind)
    assert "stands still" in found or "deadline_exceeded" in found


def test_a_task_that_outlives_its_process_is_seen() -> None:
    async def careless(_self: Generator) -> None:
        asyncio.get_running_loop().create_task(asyncio.sleep(100), name="left")

    assert "leaves tasks: ['left']" in violations(Generator, "close", careless)
