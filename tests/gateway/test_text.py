"""Text from tokens: whole characters as they come, stop strings whatever the chunking, chat templates that are strangers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from services.gateway.text import REPLACEMENT, IncrementalDecoder, StopStrings, TextTokenizer
from shared.errors import CheckpointError, MoeError
from tests.gateway.tokenizer_kinds import KINDS, byte_backend, tokenizer

cached_tokenizer = cache(tokenizer)
TEXT = st.text(st.characters(codec="utf-8", exclude_characters=REPLACEMENT), max_size=40)
MESSAGES = [{"role": "user", "content": "hello"}]


def decode_piecewise(words: TextTokenizer, ids: Iterable[int]) -> list[str]:
    decoder = IncrementalDecoder(words)
    return [*(decoder.push(token) for token in ids), decoder.finish()]


# -- tokens to text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=TEXT)
def test_pieces_add_up_to_the_text(kind: str, text: str) -> None:
    words = cached_tokenizer(kind)
    ids = words.encode(text, add_special_tokens=False)
    pieces = decode_piecewise(words, ids)
    assert "".join(pieces) == words.decode(ids)
    assert not any(REPLACEMENT in piece for piece in pieces), "half a character was shown"


@pytest.mark.parametrize("kind", ["demo", "bytes"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_of_any_tokens_add_up_to_what_they_decode_to(kind: str, data: st.DataObject) -> None:
    # Tokens as a model may choose them: broken characters, special tokens, the replacement character itself.
    words = cached_tokenizer(kind)
    ids = data.draw(st.lists(st.integers(0, words._backend.get_vocab_size() - 1), max_size=30))
    assert "".join(decode_piecewise(words, ids)) == words.decode(ids)


def test_a_character_of_several_tokens_comes_at_once_with_its_last() -> None:
    words = cached_tokenizer("bytes")
    ids = words.encode("a\u00e9\U0001f600b")
    assert len(ids) == 8
    assert decode_piecewise(words, ids) == ["a", "", "\u00e9", "", "", "", "\U0001f600", "b", ""]


def test_a_character_that_is_never_completed_comes_at_the_end_as_the_whole_text_has_it() -> None:
    words = cached_tokenizer("bytes")
    ids = words.encode("a\U0001f600")[:-1]
    pieces = decode_piecewise(words, ids)
    assert pieces[:-1] == ["a", "", "", ""]
    assert "".join(pieces) == words.decode(ids)


def test_a_real_replacement_character_is_not_swallowed() -> None:
    words = cached_tokenizer("bytes")
    text = f"a{REPLACEMENT}{REPLACEMENT}b{REPLACEMENT}"
    assert "".join(decode_piecewise(words, words.encode(text))) == text


def test_spaces_between_words_survive_a_decoder_that_strips_the_first() -> None:
    words = cached_tokenizer("fallback")
    assert "".join(decode_piecewise(words, words.encode("ab ab a"))) == "ab ab a"


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50, deadline=None)
@given(text=TEXT)
def test_the_bytes_of_the_tokens_add_up_to_the_text(kind: str, text: str) -> None:
    words = cached_tokenizer(kind)
    ids = words.encode(text, add_special_tokens=False)
    joined = b"".join(bytes(words.token_bytes(token)) for token in ids)
    # Llama's normalizer puts a space before the text.
    assert joined.decode() == (f" {text}" if kind == "fallback" and text else text)


# -- stop strings ------------------------------------------------------------------------------------------------------


def stream(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    """All that is shown of `pieces`, and whether a stop string ended it."""
    stop = StopStrings(stops)
    shown = ""
    for piece in pieces:
        more, found = stop.push(piece)
        shown += more
        assert not any(s in shown for s in stops), "a part of a stop string was shown"
        if found:
            return shown, True
    return shown + stop.finish(), False


def chunks(text: str, cuts: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(edges)]


AB = st.text("ab", min_size=1, max_size=6)


@settings(max_examples=400, deadline=None)
@given(
    text=st.text("abc", max_size=40), stops=st.lists(AB, max_size=3), cuts=st.lists(st.integers(0, 100), max_size=20)
)
def test_a_stop_string_ends_the_text_where_a_plain_search_finds_it(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    assume(not any(a in b for i, a in enumerate(stops) for j, b in enumerate(stops) if i != j))
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    assert stream(stops, chunks(text, cuts)) == ((text[: min(found)], True) if found else (text, False))


@settings(max_examples=400, deadline=None)
@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(AB, min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 100), max_size=20),
)
def test_where_the_text_ends_does_not_depend_on_how_it_came(text: str, stops: list[str], cuts: list[int]) -> None:
    assert stream(stops, chunks(text, cuts)) == stream(stops, list(text))


def test_text_is_held_back_only_while_it_may_begin_a_stop_string() -> None:
    stop = StopStrings(["\n\n", "END"])
    assert stop.push("x = 1\n") == ("x = 1", False)
    assert stop.push("y") == ("\ny", False)
    assert stop.push(" E") == (" ", False)
    assert stop.push("N") == ("", False)
    assert stop.push("T\n") == ("ENT", False)
    assert stop.push("\n and more") == ("", True)


def test_without_stop_strings_nothing_is_held_back() -> None:
    stop = StopStrings([])
    assert stop.push("abc") == ("abc", False)
    assert stop.finish() == ""


# -- the tokenizer's files ---------------------------------------------------------------------------------------------


def folder(path: Path, template: str | None = None, config: object = None) -> Path:
    byte_backend().save(str(path / "tokenizer.json"))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    if config is not None:
        (path / "tokenizer_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def render(path: Path, template: str, messages: list[dict[str, str]] | None = None) -> str:
    return TextTokenizer.open(folder(path, template)).render_chat(list(messages or MESSAGES))


def test_a_missing_or_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        TextTokenizer.open(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged"):
        TextTokenizer.open(tmp_path)
    folder(tmp_path, config="{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is damaged"):
        TextTokenizer.open(tmp_path)


@pytest.mark.parametrize("config", [[], {"chat_template": 7}, {"chat_template": [{"name": "default"}]}], ids=str)
def test_a_tokenizer_configuration_of_the_wrong_shape_is_named(tmp_path: Path, config: object) -> None:
    with pytest.raises(CheckpointError):
        TextTokenizer.open(folder(tmp_path, config=config))


def test_a_template_with_a_syntax_error_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="chat template"):
        TextTokenizer.open(folder(tmp_path, "{% for %}"))


def test_a_model_without_template_says_so(tmp_path: Path) -> None:
    with pytest.raises(MoeError, match="no chat template"):
        TextTokenizer.open(folder(tmp_path)).render_chat(MESSAGES)


def test_the_template_may_stand_in_the_tokenizers_configuration(tmp_path: Path) -> None:
    named = [
        {"name": "tools", "template": "no"},
        {"name": "default", "template": "{{ eos_token }}{{ messages[0].role }}"},
    ]
    config = {"chat_template": named, "eos_token": {"content": "<eos>"}}
    assert TextTokenizer.open(folder(tmp_path, config=config)).render_chat(MESSAGES) == "<eos>user"


# -- chat templates are strangers --------------------------------------------------------------------------------------


def test_a_usual_template_renders(tmp_path: Path) -> None:
    template = """
{%- for m in messages %}
    {%- if loop.first and m['role'] != 'user' %}{% continue %}{% endif %}
    {{- '<|' + m.role + '|>' + m.content | trim + m.extra | tojson }}
{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
    assert (
        render(tmp_path, template, [{"role": "user", "content": " h\u00e9 ", "extra": "<"}])
        == '<|user|>h\u00e9"<"\n<|assistant|>'
    )


def test_the_date_is_there_for_templates_that_show_it(tmp_path: Path) -> None:
    assert len(render(tmp_path, "{{ strftime_now('%Y-%m-%d') }}")) == 10


def test_a_template_may_refuse_the_messages(tmp_path: Path) -> None:
    with pytest.raises(MoeError, match="roles must alternate") as caught:
        render(tmp_path, "{{ raise_exception('roles must alternate') }}")
    assert caught.value.code == "invalid_request"
    assert caught.value.param == "messages"


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ strftime_now.__code__.co_consts }}",
    "{{ ('{0.__class__.__mro__}').format(1) }}",
    "{{ messages | map(attribute='__class__.__mro__') | list }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='system') }}",
    "{{ messages[0].pop('role') }}",
    "{{ self.__init__.__globals__ }}",
    "{% include 'chat_template.jinja' %}",
    "{% import 'elsewhere.jinja' as x %}",
    "{{ range(10 ** 9) | length }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_that_reaches_out_of_its_sandbox_is_refused(tmp_path: Path, template: str) -> None:
    messages = [dict(MESSAGES[0])]
    with pytest.raises(MoeError) as caught:
        render(tmp_path, template, messages)
    assert caught.value.code == "invalid_request"
    assert messages == MESSAGES


@pytest.mark.parametrize(
    "template", ["{{ ''.__class__ }}", "{{ messages | attr('__class__') }}", "{{ messages[0]['__class__'] }}"]
)
def test_a_forbidden_attribute_that_is_only_shown_is_nothing(tmp_path: Path, template: str) -> None:
    assert render(tmp_path, template) == ""


FAILURES = [
    "{{ 1 / 0 }}",
    "{{ messages[0].content + 1 }}",
    "{{ nothing.at.all }}",
    "{{ messages[7].role }}",
    "{{ strftime_now(1) }}",
    "{{ messages | sum }}",
    "{{ raise_exception() }}",
    "{{ {}['a']['b'] }}",
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "{{ 'a' * 10 ** 18 }}",
    "{{ 'a'.encode('nowhere') }}",
    "{{ [].index(1) }}",
    "{{ ''.join([1]) }}",
    "{{ namespace(a=1).a.b.c }}",
    "{{ messages[0].content.missing() }}",
    "{{ [1][1].real }}",
    "{{ dict(a=1) | dictsort(by='nothing') }}",
    "{{ 5 | list }}",
]


@pytest.mark.parametrize("template", FAILURES)
def test_a_template_that_fails_is_one_typed_error(tmp_path: Path, template: str) -> None:
    with pytest.raises(MoeError) as caught:
        render(tmp_path, template)
    assert caught.value.code == "invalid_request"


def test_text_that_looks_like_a_template_is_only_text(tmp_path: Path) -> None:
    content = "{{ 7 * 7 }}{% raw %}"
    assert render(tmp_path, "{{ messages[0].content }}", [{"role": "user", "content": content}]) == content
