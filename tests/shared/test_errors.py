"""Error codes, their HTTP statuses, and how an error travels in headers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nats.aio.client import Client
from nats.aio.msg import Msg

from shared.bus import ERROR_CODE, ERROR_TEXT, NoRespondersError, budget_deadline, error_headers, raise_for_error
from shared.errors import HTTP_STATUS, BadMessageError, MoeError


def reply(headers: dict[str, str] | None, subject: str = "moe.d.generate") -> Msg:
    return Msg(_client=Client(), subject=subject, headers=headers)


@pytest.mark.parametrize("code", HTTP_STATUS)
def test_every_code_has_an_http_status(code: str) -> None:
    error = MoeError(code, "why", param="prompt")
    assert 400 <= error.status < 600
    assert (error.code, error.message, error.param, str(error)) == (code, "why", "prompt", "why")


def test_overload_absence_and_loss_may_be_retried_and_nothing_else() -> None:
    retryable = {code for code in HTTP_STATUS if MoeError(code, "").retryable}
    assert retryable == {
        "overloaded",
        "queue_timeout",
        "router_unavailable",
        "shard_unavailable",
        "bus_unavailable",
        "draining",
        "wrong_shard",
        "chunk_lost",
        "scaling_failed",
    }


def test_an_unknown_code_is_an_internal_error_that_names_it() -> None:
    error = MoeError("no_such_code", "why")
    assert (error.code, error.status, error.message) == ("internal_error", 500, "no_such_code: why")


def test_a_bad_message_has_its_own_code() -> None:
    assert BadMessageError("why").code == "bad_message"


@pytest.mark.parametrize("code", HTTP_STATUS)
def test_an_error_arrives_as_it_was_sent(code: str) -> None:
    with pytest.raises(MoeError) as caught:
        raise_for_error(reply(error_headers(MoeError(code, "expert shard 3 is gone"))))
    assert (caught.value.code, caught.value.message) == (code, "expert shard 3 is gone")


@given(st.text(max_size=2000))
@settings(max_examples=200, deadline=None, database=None)
def test_an_errors_text_cannot_inject_protocol(text: str) -> None:
    headers = error_headers(MoeError("bad_message", text))
    assert set(headers) == {ERROR_TEXT, ERROR_CODE}
    assert headers[ERROR_TEXT].isascii()
    assert 0 < len(headers[ERROR_TEXT]) <= 1000
    assert not set(headers[ERROR_TEXT]) & {"\r", "\n"}


def test_line_breaks_become_spaces() -> None:
    headers = error_headers(MoeError("bad_message", "one\r\nNats-Service-Error-Code: overloaded\r\n\r\ntwo"))
    assert headers[ERROR_TEXT] == "one Nats-Service-Error-Code: overloaded two"


def test_a_reply_without_headers_is_no_error() -> None:
    for headers in (None, {}, {"traceparent": "00-1-2-01"}, {ERROR_TEXT: "text without a code"}):
        raise_for_error(reply(headers))


def test_a_code_that_nobody_knows_is_an_internal_error() -> None:
    with pytest.raises(MoeError) as caught:
        raise_for_error(reply({ERROR_CODE: "500", ERROR_TEXT: "from another service"}))
    assert (caught.value.code, caught.value.message) == ("internal_error", "from another service")


def test_the_servers_503_means_that_nobody_listens() -> None:
    with pytest.raises(NoRespondersError) as caught:
        raise_for_error(reply({"Status": "503"}))
    assert caught.value.code == "router_unavailable"


@pytest.mark.parametrize(
    ("headers", "deadline"),
    [
        (None, None),
        ({}, None),
        ({"Moe-Budget-Ms": ""}, None),
        ({"Moe-Budget-Ms": "soon"}, None),
        ({"Moe-Budget-Ms": "1500"}, 101.5),
        ({"Moe-Budget-Ms": "0.5"}, 100.0005),
        ({"Moe-Budget-Ms": "0"}, 100.0),
        ({"Moe-Budget-Ms": "-1000"}, 99.0),
    ],
)
def test_a_budget_is_counted_from_now(headers: dict[str, str] | None, deadline: float | None) -> None:
    assert budget_deadline(headers, 100.0) == deadline
