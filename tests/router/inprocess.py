"""An engine in this process, experts and all: for tests of the engine that need no bus."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from services.router.compiled_model import CompiledModel
from services.router.engine import Engine
from services.router.experts import LocalExperts
from services.router.kv_cache import BlockPool
from services.router.messages import GenerateChunk, GenerateRequest
from services.router.model import DenseModel
from services.router.scheduler import Scheduler
from services.router.sequence import Sequence
from shared.checkpoint import Checkpoint
from shared.compute import Compute
from shared.errors import MoeError
from shared.experts import ExpertBank
from shared.tensors import TORCH_DTYPE


@dataclass
class Result:
    """Everything one generation said."""

    tokens: list[int] = field(default_factory=list)
    chunks: list[GenerateChunk] = field(default_factory=list)
    error: MoeError | None = None
    done: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def finish_reason(self) -> str | None:
        return self.chunks[-1].finish_reason if self.chunks else None


class LocalEngine:
    """Submits requests to an engine and collects what it says."""

    def __init__(self, engine: Engine, scheduler: Scheduler, eos: frozenset[int]) -> None:
        self.engine = engine
        self.scheduler = scheduler
        self._eos = eos
        self._results: dict[str, Result] = {}

    async def sink(self, sequence: Sequence, chunk: GenerateChunk | MoeError) -> None:
        result = self._results[sequence.request.id]
        if isinstance(chunk, MoeError):
            result.error = chunk
            result.done.set()
            return
        result.chunks.append(chunk)
        result.tokens += chunk.token_ids
        if chunk.finish_reason:
            result.done.set()

    def submit(self, request: GenerateRequest, *, deadline: float | None = None) -> Result:
        result = self._results[request.id] = Result()
        self.engine.submit(Sequence(request, time.monotonic(), deadline, self._eos))
        return result

    async def generate(self, request: GenerateRequest) -> Result:
        result = self.submit(request)
        async with asyncio.timeout(60):
            await result.done.wait()
        return result


@contextlib.asynccontextmanager
async def local_engine(
    path: Path,
    *,
    blocks: int = 256,
    block_tokens: int = 4,
    batch_size: int = 16,
    prefill_chunk_tokens: int = 16,
    compiled: bool = False,
) -> AsyncIterator[LocalEngine]:
    """An engine of the checkpoint at `path`, running until the block ends."""
    checkpoint = Checkpoint.open(path)
    config = checkpoint.config
    dtype, device = TORCH_DTYPE[config.dtype], torch.device("cpu")
    compute = Compute()
    kind = CompiledModel if compiled else DenseModel
    model = kind.load(checkpoint, dtype, device, lambda _: None)
    model.allocate_cache(blocks, block_tokens)
    bank = ExpertBank(checkpoint, dtype=dtype, device=device)
    bank.load(range(config.num_experts))
    scheduler = Scheduler(
        BlockPool(blocks, block_tokens),
        batch_size=batch_size,
        prefill_chunk_tokens=prefill_chunk_tokens,
        max_waiting=1000,
    )
    local: LocalEngine

    async def sink(sequence: Sequence, chunk: GenerateChunk | MoeError) -> None:
        await local.sink(sequence, chunk)

    engine = Engine(model, LocalExperts(bank, compute), compute, scheduler, sink)
    local = LocalEngine(engine, scheduler, frozenset(config.eos_token_ids))
    task = asyncio.create_task(engine.run(), name="engine")
    try:
        yield local
        assert scheduler.idle, "a sequence was left in the engine"
        assert scheduler.pool.free == blocks, "blocks were leaked"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        compute.close()
