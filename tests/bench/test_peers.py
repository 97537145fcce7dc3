"""Which peers are measured, and what is said of the others."""

from __future__ import annotations

import pytest

from bench.peers import KINDS, PeerKind, choose

HERE = PeerKind("here", ("json",), "'openmoe[here]'", "bench.here")
AWAY = PeerKind("away", ("json", "no_such_package"), "'openmoe[away]'", "bench.away")


def test_all_that_are_installed_are_measured() -> None:
    chosen, left_out = choose(None, {"here": HERE, "away": AWAY})
    assert chosen == [HERE]
    assert left_out == ["away: no_such_package not installed (pip install 'openmoe[away]'), left out"]


def test_what_is_asked_for_must_be_there() -> None:
    assert choose("here,here", {"here": HERE, "away": AWAY}) == ([HERE], [])
    with pytest.raises(ValueError, match=r"away: no_such_package not installed \(pip install 'openmoe\[away\]'\)"):
        choose("here,away", {"here": HERE, "away": AWAY})
    with pytest.raises(ValueError, match="no peer is installed"):
        choose(None, {"away": AWAY})


def test_what_cannot_be_measured_is_said_to_be_so() -> None:
    with pytest.raises(ValueError, match=r"vllm: not a peer that can be measured here .*transformers, llama\.cpp"):
        choose("transformers,vllm")
    assert list(KINDS) == ["transformers", "llama.cpp"]
