"""The continuous-batching engine: schedule, run, sample, emit, step after step."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog
import torch

from services.router.batch import Batch, Span, build_batch
from services.router.experts import Experts
from services.router.forward import StepResult, forward
from services.router.kv_cache import BlockPool
from services.router.messages import FinishReason, GenerateChunk, TokenLogprob
from services.router.model import DenseModel
from services.router.sampling import logprobs, sample
from services.router.scheduler import Scheduler, Work
from services.router.sequence import Sequence
from shared.compute import Compute
from shared.errors import MoeError
from shared.histogram import Counts, Histogram
from shared.instrumentation import (
    BATCH_TOKENS,
    DECODE_TIME,
    DEGRADED_TOKENS,
    PREEMPTIONS,
    PREFILL_TIME,
    QUEUE_TIME,
    STEP_SECONDS,
)
from shared.logs import request_id
from shared.tensors import to_wire

log = structlog.get_logger()

NEVER = 2**62
PROGRESS_SECONDS = 5.0
"""A long prefill says so often, by an empty chunk, that it is still at work."""
NAMED_REQUESTS = 16
"""So many ids go along with a step's expert calls: a header has its price."""


@dataclass
class Emission:
    """What one step says about one sequence."""

    sequence: Sequence
    token: int | None = None
    logprob: TokenLogprob | None = None
    logits: torch.Tensor | None = None
    """[1, V]"""
    prompt_logits: torch.Tensor | None = None
    """[n, V]"""
    routing: torch.Tensor | None = None
    """[n, L, k]"""


Sink = Callable[[Sequence, GenerateChunk | MoeError], Awaitable[None]]


class Engine:
    """Runs all sequences of one router. `sink` receives every chunk, in order per sequence."""

    def __init__(
        self,
        model: DenseModel,
        experts: Experts,
        compute: Compute,
        scheduler: Scheduler,
        sink: Sink,
        *,
        model_name: str = "",
    ) -> None:
        self._model = model
        self._experts = experts
        self._compute = compute
        self._scheduler = scheduler
        self._sink = sink
        self._wake = asyncio.Event()
        self._sequences: dict[str, Sequence] = {}
        self._preemptions_seen = 0
        self.tokens = 0
        self.finished = 0
        self.failed = 0
        self.errors: dict[str, int] = {}
        """Failed generations by code."""
        self._queue_histogram, self._step_histogram = Histogram(), Histogram()
        self._queue_time = QUEUE_TIME.labels(model_name)
        self._prefill_time = PREFILL_TIME.labels(model_name)
        self._decode_time = DECODE_TIME.labels(model_name)
        self._batch_tokens = BATCH_TOKENS.labels(model_name)
        self._step_seconds = STEP_SECONDS.labels(model_name)
        self._preemptions = PREEMPTIONS.labels(model_name)

    @property
    def pool(self) -> BlockPool:
        return self._scheduler.pool

    @property
    def running(self) -> int:
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        return len(self._scheduler.waiting)

    def sequences(self) -> list[Sequence]:
        return list(self._sequences.values())

    def latencies(self) -> dict[str, Counts]:
        """Counts per bucket since the start, as `Status.latencies` has them."""
        return {"queue": self._queue_histogram.counts(), "step": self._step_histogram.counts()}

    def submit(self, sequence: Sequence) -> None:
        """Put a checked request in line.

        Raises:
            MoeError: `overloaded`, if the line is full; `invalid_request`, if its id is in use.

        """
        if self._scheduler.full and not sequence.output:
            raise MoeError("overloaded", f"{self.waiting} generations are waiting; try again in a moment")
        if sequence.request.id in self._sequences:
            raise MoeError("invalid_request", f"a generation with the id {sequence.request.id} is running", param="id")
        self._sequences[sequence.request.id] = sequence
        self._scheduler.add(sequence)
        self._wake.set()

    def cancel(self, generation_id: str) -> bool:
        """Stop a generation; its blocks are free before the next step. False if there is none of this id."""
        sequence = self._sequences.get(generation_id)
        if sequence is None:
            return False
        sequence.cancelled = True
        self._wake.set()
        return True

    def told(self, generation_ids: list[str]) -> dict[str, int]:
        """By the id of each of these generations that is here: how many new tokens it has, those it came with too."""
        known = ((name, self._sequences.get(name)) for name in generation_ids)
        return {name: len(sequence.output) for name, sequence in known if sequence and not sequence.cancelled}

    async def run(self) -> None:
        while True:
            await self._drop_cancelled_and_expired()
            work = self._scheduler.schedule(time.monotonic())
            if not work:
                self._wake.clear()
                await self._idle()
                continue
            try:
                await self.step(work)
            except MoeError as error:
                await self._fail(work, error)
            except Exception:  # a bug of ours must not end the engine: these requests fail, the next ones run
                log.exception("step.failed")
                await self._fail(work, MoeError("internal_error", "internal error; see the router's log"))

    async def step(self, work: list[Work]) -> None:
        """One step: run all tokens of `work` through the model, choose the next tokens, tell the clients."""
        start = time.perf_counter()
        # The experts' calls, and their logs, name the requests that they serve.
        request_id.set(",".join(w.sequence.request_id for w in work[:NAMED_REQUESTS]))
        want_routing = any(w.sequence.request.return_routing for w in work)
        rows = sum(w.count for w in work)
        batch = await self._compute(self._build, work, rows=rows)
        result = await forward(self._model, self._experts, self._compute, batch, want_routing=want_routing)
        if result.degraded is not None:
            self._note_degraded(work, result.degraded)
        emissions = await self._compute(self._sample, work, batch, result, rows=rows)
        await self._emit(work, emissions)
        await asyncio.sleep(0)  # what was told leaves before the next step computes
        seconds = time.perf_counter() - start
        prompt_tokens = sum(w.count for w in work if w.count > 1)
        self._scheduler.pace.observe(rows - prompt_tokens, prompt_tokens, seconds)
        self._step_seconds.observe(seconds)
        self._step_histogram.observe(seconds)
        self._batch_tokens.observe(batch.size)
        self._preemptions.inc(self._scheduler.preemptions - self._preemptions_seen)
        self._preemptions_seen = self._scheduler.preemptions

    def _note_degraded(self, work: list[Work], degraded: torch.Tensor) -> None:
        """Mark the sequences with rows that lacked experts; `degraded` [T] bool."""
        DEGRADED_TOKENS.inc(int(degraded.sum()))
        row = 0
        for w in work:
            w.sequence.degraded |= bool(degraded[row : row + w.count].any())
            row += w.count

    async def _idle(self) -> None:
        """Wait for a request; if some wait in line (for blocks, or to expire), look again soon."""
        try:
            async with asyncio.timeout(0.05 if self._scheduler.waiting else None):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _drop_cancelled_and_expired(self) -> None:
        for sequence in [s for s in self._sequences.values() if s.cancelled]:
            self._forget(sequence)
            await self._sink(sequence, GenerateChunk(id=sequence.request.id, finish_reason="cancelled"))
        for sequence in self._scheduler.expired(time.monotonic()):
            self._forget(sequence)
            await self._give_up(sequence, MoeError("queue_timeout", "the request waited longer than its budget"))

    async def _fail(self, work: list[Work], error: MoeError) -> None:
        log.warning("step.gave_up", code=error.code, reason=error.message, generations=len(work))
        for w in work:
            if w.sequence.request.id in self._sequences:
                self._forget(w.sequence)
                await self._give_up(w.sequence, error)

    async def _give_up(self, sequence: Sequence, error: MoeError) -> None:
        self.failed += 1
        self.errors[error.code] = self.errors.get(error.code, 0) + 1
        await self._sink(sequence, error)

    def _forget(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        self._sequences.pop(sequence.request.id, None)

    # -- in the compute thread ---------------------------------------------------------------------------------------

    def _build(self, work: list[Work]) -> Batch:
        spans = []
        for w in work:
            s = w.sequence
            last = w.start + w.count - 1
            logits_from = last if w.completes and s.request.max_tokens else NEVER
            if s.wants_prompt_rows:
                logits_from = min(logits_from, w.start)
            tokens = s.tokens(w.start, w.start + w.count)
            spans.append(Span(tokens, w.start, s.prompt_length, s.blocks, logits_from))
        return build_batch(spans, self._scheduler.pool.block_tokens, self._model.device)

    def _sample(self, work: list[Work], batch: Batch, result: StepResult) -> list[Emission]:
        rows = batch.logits_rows.tolist()
        where = {row: i for i, row in enumerate(rows)}
        emissions = [Emission(w.sequence) for w in work]
        first_row = 0
        chosen: list[tuple[Emission, int]] = []
        for w, emission in zip(work, emissions, strict=True):
            s, r = w.sequence, w.sequence.request
            if s.wants_prompt_rows and w.start < s.prompt_length:
                self._prompt_rows(w, emission, result.logits[where[first_row] : where[first_row] + w.count])
            if r.return_routing and result.routing is not None and w.start + w.count > s.routing_rows_sent:
                new = s.routing_rows_sent - w.start
                emission.routing = result.routing[first_row + max(new, 0) : first_row + w.count].int()
            if w.completes and r.max_tokens:
                chosen.append((emission, where[first_row + w.count - 1]))
            first_row += w.count
        if chosen:
            self._choose(chosen, result.logits)
        return emissions

    def _prompt_rows(self, w: Work, emission: Emission, logits: torch.Tensor) -> None:
        """Log-probabilities and logits of prompt tokens; logits [n, V] are those of the rows from w.start on."""
        s, r = w.sequence, w.sequence.request
        if r.prompt_logprobs >= 0:
            if not s.prompt_logprobs:
                s.prompt_logprobs.append(None)
            known = len(s.prompt_logprobs)
            # The row at position p predicts the token at p + 1.
            targets = r.token_ids[max(known, w.start + 1) : w.start + w.count + 1]
            if targets:
                at = max(known, w.start + 1) - 1 - w.start
                top = [r.prompt_logprobs] * len(targets)
                s.prompt_logprobs += logprobs(logits[at : at + len(targets)], targets, top)
        if r.return_prompt_logits:
            new = max(s.prompt_rows_sent - w.start, 0)
            end = min(w.count, s.prompt_length - w.start)
            if new < end:
                emission.prompt_logits = logits[new:end].clone()

    def _choose(self, chosen: list[tuple[Emission, int]], logits: torch.Tensor) -> None:
        """Sample the sequences whose next token is due, together."""
        own = logits[[row for _, row in chosen]]  # [B, V], a copy
        scored = [i for i, (e, _) in enumerate(chosen) if e.sequence.request.logprobs >= 0]
        raw = own[scored].clone() if scored else own
        for (emission, _), row in zip(chosen, own, strict=True):
            if emission.sequence.request.return_logits:
                emission.logits = row.clone()[None]
        tokens = sample(own, [e.sequence for e, _ in chosen])
        for (emission, _), token in zip(chosen, tokens, strict=True):
            emission.token = token
        if scored:
            top = [chosen[i][0].sequence.request.logprobs for i in scored]
            values = logprobs(raw, [tokens[i] for i in scored], top)
            for i, value in zip(scored, values, strict=True):
                chosen[i][0].logprob = value

    # -- telling -----------------------------------------------------------------------------------------------------

    async def _emit(self, work: list[Work], emissions: list[Emission]) -> None:
        now = time.monotonic()
        for w, emission in zip(work, emissions, strict=True):
            s, r = w.sequence, w.sequence.request
            s.computed = w.start + w.count
            if s.cancelled:
                continue
            finish: FinishReason | None = None
            stop_token = None
            if emission.token is not None:
                finish, stop_token = s.append(emission.token)
                self.tokens += 1
                self._observe_token(s, now, finish)
            elif w.completes:
                finish = "length"
            new = len(s.output) - len(r.output_ids)
            prompt_done = s.computed >= s.prompt_length and r.prompt_logprobs >= 0 and new <= 1
            if emission.token is None and not finish and emission.prompt_logits is None and emission.routing is None:
                if now - (s.last_sign or s.arrival) > PROGRESS_SECONDS:
                    s.last_sign = now
                    await self._sink(s, GenerateChunk(id=r.id, start=len(s.output)))
                continue
            chunk = GenerateChunk(
                id=r.id,
                token_ids=[] if emission.token is None else [emission.token],
                start=len(s.output) if emission.token is None else len(s.output) - 1,
                logprobs=[] if emission.logprob is None else [emission.logprob],
                prompt_logprobs=s.prompt_logprobs if prompt_done and (emission.token is not None or finish) else None,
                logits=None if emission.logits is None else to_wire(emission.logits),
                prompt_logits=None if emission.prompt_logits is None else to_wire(emission.prompt_logits),
                routing=None if emission.routing is None else to_wire(emission.routing),
                finish_reason=finish,
                stop_token_id=stop_token,
                degraded=s.degraded,
            )
            if emission.prompt_logits is not None:
                s.prompt_rows_sent += emission.prompt_logits.shape[0]
            if emission.routing is not None:
                s.routing_rows_sent += emission.routing.shape[0]
            if finish:
                self.finished += 1
                self._forget(s)
                log.info("generation.finished", request_id=s.request_id, id=r.id, tokens=len(s.output), reason=finish)
            await self._sink(s, chunk)

    def _observe_token(self, s: Sequence, now: float, finish: FinishReason | None) -> None:
        if s.first_token is None:
            s.first_token = now
            s.deadline = None
            if s.admitted is not None:
                self._queue_time.observe(s.admitted - s.arrival)
                self._queue_histogram.observe(s.admitted - s.arrival)
                self._prefill_time.observe(now - s.admitted)
        if finish:
            self._decode_time.observe(now - s.first_token)
