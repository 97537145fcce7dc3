"""What an executor is."""

from __future__ import annotations

from typing import Protocol

from services.monitor.utilisation import Service
from shared.errors import MoeError


class Executor(Protocol):
    """Changes how many instances of a service there are.

    Whoever goes is sent SIGTERM and time: a worker or router then says that it drains, hands over what only it holds,
    and finishes what it has begun. So no request fails by it.
    """

    acts: bool
    """False: it changes nothing, whatever is asked."""

    async def counts(self) -> dict[Service, int]:
        """How many were asked for last, by service; what it cannot scale is not there.

        Raises:
            MoeError: `scaling_failed`, `bus_unavailable`, `deadline_exceeded`: it cannot be found out.

        """
        ...

    async def scale(self, service: Service, count: int, reason: str) -> str:
        """Have `count` instances of `service`; what was done, a sentence. The same again does nothing.

        Raises:
            MoeError: as `counts`; what was asked for may have been begun.

        """
        ...

    async def close(self) -> None:
        """Give back what it holds."""
        ...


def failed(text: str) -> MoeError:
    """The error of an executor that could not do what it was asked."""
    return MoeError("scaling_failed", text)


def not_named(service: Service) -> MoeError:
    """The error for a service that SCALING_TARGETS leaves out."""
    return failed(f"SCALING_TARGETS names nothing for {service}, so it is not scaled")
