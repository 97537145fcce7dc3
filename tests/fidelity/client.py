"""A client of the bus: asks routers for generations and collects everything they say."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from services.router.messages import GenerateChunk, GenerateRequest
from shared import subjects, wire
from shared.bus import Bus
from shared.tensors import from_wire

CHUNK_SECONDS = 60


@dataclass(frozen=True)
class Answer:
    """All chunks of one generation."""

    chunks: list[GenerateChunk]

    @property
    def tokens(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.token_ids]

    @property
    def finish_reason(self) -> str | None:
        return self.chunks[-1].finish_reason

    @property
    def logits(self) -> torch.Tensor:
        """[new, V]"""
        return _rows([chunk.logits for chunk in self.chunks])

    @property
    def prompt_logits(self) -> torch.Tensor:
        """[T, V]"""
        return _rows([chunk.prompt_logits for chunk in self.chunks])


def _rows(values: list[wire.Tensor | None]) -> torch.Tensor:
    return torch.cat([from_wire(value, "logits", (None, None), ("float32",)) for value in values if value])


async def generate(bus: Bus, deployment: str, request: GenerateRequest) -> Answer:
    """Ask whichever router takes it, and read to the end.

    Raises:
        MoeError: what the router says went wrong.

    """
    chunks: list[GenerateChunk] = []
    with bus.open_stream() as stream:
        await bus.publish(subjects.generate(deployment), wire.encode(request), reply=stream.inbox)
        while not chunks or chunks[-1].finish_reason is None:
            chunks.append(wire.decode(GenerateChunk, await stream.next(CHUNK_SECONDS)))
    return Answer(chunks)
