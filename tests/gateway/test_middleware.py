"""Who may come in: the bearer token."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.middleware import authorized

TOKEN = "correct-horse"


@pytest.mark.parametrize("header", [b"Bearer correct-horse", b"bearer correct-horse", b"BEARER   correct-horse  "])
def test_the_right_token_opens_whatever_the_schemes_case(header: bytes) -> None:
    assert authorized(header, TOKEN)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"Bearer",
        b"Bearer ",
        b"correct-horse",
        b"Basic correct-horse",
        b"Bearercorrect-horse",
        b"Bearer correct-hors",
        b"Bearer correct-horse-battery",
        b"Bearer CORRECT-HORSE",
        b"Bearer correct-horse correct-horse",
        b"Bearer \xff\xfe",
        b"Bearer correct-horse\x00",
        b", Bearer correct-horse",
    ],
)
def test_anything_else_does_not(header: bytes) -> None:
    assert not authorized(header, TOKEN)


@settings(deadline=None)
@given(st.binary(max_size=40))
def test_no_other_header_opens_and_none_is_an_error(header: bytes) -> None:
    assert authorized(header, TOKEN) == (header.lower().startswith(b"bearer ") and header[7:].strip() == TOKEN.encode())


def test_a_token_that_is_not_ascii_is_compared_as_utf_8() -> None:
    assert authorized("Bearer schl\u00fcssel".encode(), "schl\u00fcssel")
    assert not authorized(b"Bearer schl\xfcssel", "schl\u00fcssel")
