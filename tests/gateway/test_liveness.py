"""Which streams are asked about, and by whom: the verdicts themselves are in test_generation.py, over real NATS."""

from __future__ import annotations

from dataclasses import dataclass

from services.gateway.liveness import SILENT_SECONDS, Watched, silent
from shared.errors import MoeError


@dataclass
class Inbox:
    """Where chunks come, and lie while the reader is slow."""

    unread: bool = False

    def fail(self, _error: MoeError) -> None:
        raise AssertionError("nobody was asked")


def stream(name: str, instance: str, last_sign: float, *, unread: bool = False) -> Watched:
    return Watched(name, instance, Inbox(unread), last_sign)


def test_only_the_silent_are_asked_about_and_each_router_once() -> None:
    fresh, old, older, other = (
        stream("fresh", "a", 10.0),
        stream("old", "a", 9.0),
        stream("older", "a", 8.0),
        stream("other", "b", 1.0),
    )
    found = silent({fresh, old, older, other}, 10.0)
    assert {instance: {s.id for s in streams} for instance, streams in found.items()} == {
        "a": {"old", "older"},
        "b": {"other"},
    }
    assert silent({fresh}, 10.0 + SILENT_SECONDS) == {"a": [fresh]}
    slow_reader = stream("slow", "a", 1.0, unread=True)
    assert not silent([slow_reader], 10.0), "what it waits for has come"
    assert not silent(set(), 10.0)
