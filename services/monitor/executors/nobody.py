"""SCALING_EXECUTOR=none: decisions are only told, for somebody else to act on."""

from __future__ import annotations

from services.monitor.executors.base import failed
from services.monitor.utilisation import Service


class NobodyExecutor:
    """Changes nothing."""

    acts = False

    async def counts(self) -> dict[Service, int]:
        return {}

    async def scale(self, service: Service, count: int, reason: str) -> str:
        del reason
        raise failed(
            f"{count} of {service} cannot be had: SCALING_EXECUTOR is none; "
            "set it to local, compose or kubernetes, or start them yourself"
        )

    async def close(self) -> None:
        return
