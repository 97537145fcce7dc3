"""Names on the bus: what is built can be parsed, and nothing can be smuggled in."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import subjects

tokens = st.from_regex(r"[A-Za-z0-9_-]{1,20}", fullmatch=True)
WRONG = ["", " ", "a b", "a.b", "a*", ">", "*", "a\n", "a\r\nPUB x 0\r\n", "\na", "a\0", "é", "a\u2028", "a/b", "$SRV"]
BUILDERS: dict[str, Callable[[str], str]] = {
    "generate": subjects.generate,
    "forward": subjects.forward,
    "experts": lambda value: subjects.experts(value, 0),
    "worker's deployment": lambda value: subjects.worker(value, "w"),
    "worker's instance": lambda value: subjects.worker("d", value),
    "status' service": lambda value: subjects.status(value, "i"),
    "status' instance": lambda value: subjects.status("s", value),
    "control's service": lambda value: subjects.control(value, "i"),
    "control's instance": lambda value: subjects.control("s", value),
    "plan": subjects.plan,
    "event": subjects.event,
    "inbox' service": lambda value: subjects.inbox_prefix(value, "i"),
    "inbox' instance": lambda value: subjects.inbox_prefix("s", value),
}


def test_subjects_are_those_of_the_protocol() -> None:
    d = subjects.deployment("demo", "3f2a91bc" + "0" * 56)
    assert d == "demo-3f2a91bc"
    assert subjects.generate(d) == "moe.demo-3f2a91bc.generate"
    assert subjects.forward(d) == "moe.demo-3f2a91bc.forward"
    assert subjects.experts(d, 12) == "moe.demo-3f2a91bc.experts.12"
    assert subjects.shard_queue(12) == "shard-12"
    assert subjects.worker(d, "expert-1") == "moe.demo-3f2a91bc.worker.expert-1"
    assert subjects.status("router", "router-1") == "moe.status.router.router-1"
    assert subjects.control("router", "router-1") == "moe.control.router.router-1"
    assert subjects.plan(d) == "moe.demo-3f2a91bc.plan"
    assert subjects.event("alert") == "moe.events.alert"


@given(tokens, tokens)
@settings(max_examples=100, deadline=None, database=None)
def test_a_status_subject_is_parsed_into_what_it_was_built_from(service: str, instance: str) -> None:
    assert subjects.parse_status(subjects.status(service, instance)) == (service, instance)


@given(tokens)
@settings(max_examples=100, deadline=None, database=None)
def test_a_plans_subject_is_parsed_into_what_it_was_built_from(deployment: str) -> None:
    assert subjects.parse_plan(subjects.plan(deployment)) == deployment


@pytest.mark.parametrize("subject", ["", "moe.d.plan.x", "moe.d.generate", "x.d.plan", "moe.a b.plan", "moe..plan"])
def test_what_is_no_plans_subject_is_refused(subject: str) -> None:
    with pytest.raises(ValueError, match=r"plan|subject"):
        subjects.parse_plan(subject)


@given(st.text(max_size=30) | st.text("moe.staus>*\r\n ", max_size=30).map("moe.status.".__add__))
@settings(max_examples=200, deadline=None, database=None)
def test_what_is_parsed_builds_the_same_subject_again(subject: str) -> None:
    try:
        parts = subjects.parse_status(subject)
    except ValueError:
        return
    assert subjects.status(*parts) == subject


@pytest.mark.parametrize(
    "subject",
    ["", "moe.status", "moe.status.a", "moe.status.a.b.c", "moe.status..b", "moe.status.a.", "moe.control.a.b",
     "xmoe.status.a.b", "moe.status.a.b\n", "moe.status.a. b", "moe.status.a.>"],
)  # fmt: skip
def test_anything_else_is_no_status_subject(subject: str) -> None:
    with pytest.raises(ValueError, match=r"subject"):
        subjects.parse_status(subject)


@pytest.mark.parametrize("value", WRONG, ids=ascii)
@pytest.mark.parametrize("name", BUILDERS)
def test_a_token_that_would_inject_protocol_is_refused(name: str, value: str) -> None:
    with pytest.raises(ValueError, match="cannot be part of a NATS subject"):
        BUILDERS[name](value)


def test_a_shard_is_a_number() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        subjects.experts("d", "0\r\nPUB x 0")  # type: ignore[arg-type]


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None, database=None)
def test_any_model_name_becomes_a_token(name: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_-]+", subjects.slug(name))
    assert subjects.token(subjects.deployment(name, "0123456789abcdef")).endswith("-01234567")


def test_a_name_that_is_a_token_already_is_kept() -> None:
    assert subjects.slug("OLMoE-1B_7B") == "OLMoE-1B_7B"
    assert subjects.slug("org/model v1.5") == "org-model-v1-5"
    assert subjects.slug("模型") == "model"
