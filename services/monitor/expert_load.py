"""A moving average of the tokens of each expert, from the routers' reports. Pure; the clock is passed in."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from shared.status import Status


class ExpertLoad:
    """Of one deployment: tokens per MoE layer and expert, of which half are forgotten each half-life."""

    def __init__(self, half_life_seconds: float) -> None:
        self._half_life = half_life_seconds
        self._counted: dict[str, tuple[float, npt.NDArray[np.int64]]] = {}
        """By router: when it started, and what it had counted [L, E]."""
        self._at: float | None = None
        self.tokens: npt.NDArray[np.float64] = np.zeros((0, 0))
        """[L, E]; nothing, before a router has reported."""

    def observe(self, routers: Iterable[Status], now: float) -> None:
        """Add what the routers have counted since they were last looked at.

        A router that is new to us may have counted for days, so what it has counted so far is not of now.

        Args:
            routers: their last reports.
            now: seconds, on any clock.

        """
        if self._at is not None:
            self.tokens = self.tokens * 0.5 ** (max(0.0, now - self._at) / self._half_life)
        self._at = now
        counted = {}
        for status in routers:
            if len({len(row) for row in status.expert_tokens}) != 1 or not status.expert_tokens[0]:
                continue
            counts = np.array(status.expert_tokens, dtype=np.int64)
            if counts.shape != self.tokens.shape:
                self.tokens = np.zeros(counts.shape)
            started, before = self._counted.get(status.instance, (None, counts))
            if started == status.started and before.shape == counts.shape:
                self.tokens = self.tokens + np.maximum(counts - before, 0)
            counted[status.instance] = (status.started, counts)
        self._counted = counted
