"""Which streams are asked about, and by whom: the verdicts themselves are in test_generation.py, over real NATS."""

from __future__ import annotations

from services.gateway.liveness import SILENT_SECONDS, Watched, silent
from shared.errors import MoeError


def stream(name: str, instance: str, last_sign: float) -> Watched:
    def lost(_error: MoeError) -> None:
        raise AssertionError("nobody was asked")

    return Watched(name, instance, lost, last_sign)


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
    assert not silent(set(), 10.0)
