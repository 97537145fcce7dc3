"""What `openmoe scale` understands."""

from __future__ import annotations

import pytest

from services.monitor.messages import ScaleReply
from services.scale_command import parse, sentence
from shared.errors import StartError


def test_counts_are_read_by_service() -> None:
    assert parse(["expert=4", "router=2"]) == {"expert": 4, "router": 2}
    assert parse(["router=1"]) == {"router": 1}


@pytest.mark.parametrize(
    "word", ["expert", "expert=", "expert=x", "expert=-1", "expert=0", "expert=1025", "gateway=2", "expert=4.0", "=4"]
)
def test_anything_else_is_refused_by_name(word: str) -> None:
    with pytest.raises(StartError, match="expert=N"):
        parse([word])


def test_a_service_is_given_once() -> None:
    with pytest.raises(StartError, match="twice"):
        parse(["expert=4", "expert=5"])


def test_what_was_done_is_said_with_what_there_is() -> None:
    assert sentence(ScaleReply(counts={"router": 1, "expert": 4}, text="expert-5 start")) == (
        "expert-5 start (expert=4, router=1)"
    )
