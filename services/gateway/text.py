"""Text and tokens: the tokenizer, the chat template, streaming text at whole characters, stop strings."""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from shared.errors import CheckpointError, MoeError

CONFIG = "tokenizer_config.json"
REPLACEMENT = "\ufffd"
OPEN_TOKENS = 16
"""So many tokens may wait for a character's end; it has at most four bytes, so more means that it is broken."""
METASPACE = "\u2581"
_BYTE_FALLBACK = re.compile(r"<0x[0-9A-F]{2}>\Z")


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's table).

    Printable bytes stand for themselves, the others, in order, for the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


class TextTokenizer:
    """tokenizer.json and the chat template of a checkpoint folder."""

    def __init__(self, backend: Backend, template: jinja2.Template | None, variables: dict[str, Any]) -> None:
        self._backend = backend
        self._byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        self._added = frozenset(backend.get_added_tokens_decoder())
        self._template = template
        self._variables = variables

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the tokenizer of the checkpoint folder `path`.

        Raises:
            CheckpointError: a file is missing or damaged.

        """
        file = path / "tokenizer.json"
        if not file.exists():
            raise CheckpointError(f"{file} is missing; the gateway needs the tokenizer")
        try:
            backend = Backend.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise CheckpointError(f"{file} is damaged: {error}") from None
        backend.no_truncation()
        backend.no_padding()
        config = _read_config(path)
        source = config.get("chat_template")
        if isinstance(source, list):
            source = next(
                (t.get("template", False) for t in source if isinstance(t, dict) and t.get("name") == "default"), None
            )
        if (path / "chat_template.jinja").exists():
            source = (path / "chat_template.jinja").read_text(encoding="utf-8")
        if source is not None and not isinstance(source, str):
            raise CheckpointError(f"{path / CONFIG}: chat_template must be a text")
        variables = {name: _token(config.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        try:
            template = _environment().from_string(source) if source else None
        except jinja2.TemplateError as error:
            raise CheckpointError(f"{path}: the chat template is damaged: {error}") from None
        return cls(backend, template, variables)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for; a token may be a part of a character."""
        name = self._backend.id_to_token(token)
        if name is None:  # the model's vocabulary may be padded beyond the tokenizer's
            return b""
        if token in self._added:
            return name.encode()
        if self._byte_level:
            return bytes(_BYTE_OF[c] for c in name) if all(c in _BYTE_OF for c in name) else name.encode()
        if _BYTE_FALLBACK.match(name):
            return bytes([int(name[3:5], 16)])
        return name.replace(METASPACE, " ").encode()

    def token_text(self, token: int) -> str:
        r"""One token's own text, for logprobs; a part of a character is shown as OpenAI does, `bytes:\xe2\x80`."""
        data = self.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def render_chat(self, messages: list[dict[str, Any]]) -> str:
        """The prompt of a conversation, with the assistant's turn opened.

        Raises:
            MoeError: `invalid_request`, if there is no template or it refuses the messages.

        """
        if self._template is None:
            raise MoeError("invalid_request", "this model has no chat template; use /v1/completions")
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._variables)
        except jinja2.TemplateError as error:
            raise MoeError("invalid_request", f"the chat template refused it: {error}", param="messages") from None
        except Exception as error:  # the template is the checkpoint's: whatever it does wrong is one typed error
            text = f"the chat template failed: {type(error).__name__}: {error}"
            raise MoeError("invalid_request", text, param="messages") from None


def _read_config(path: Path) -> dict[str, Any]:
    """tokenizer_config.json, if there is one.

    Raises:
        CheckpointError: it is damaged.

    """
    file = path / CONFIG
    if not file.exists():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is damaged: it is no JSON object")
    return config


def _token(value: Any) -> str:
    """A special token as templates show it; older files write an object."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def _environment() -> jinja2.Environment:
    """Templates come with checkpoints, so they are strangers: sandboxed, immutable, without the file system."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: dt.datetime.now().astimezone().strftime(form)
    return environment


class IncrementalDecoder:
    """Text of a growing token sequence, given out only at whole characters."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        """Tokens from the context's start on."""
        self._shown = 0
        self._before = ""
        """The text of the first `_shown` of them, which was given out."""

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is still open."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith(REPLACEMENT):
            return self._give_out_broken(text) if len(self._ids) - self._shown > OPEN_TOKENS else ""
        return self._give_out(len(self._ids), text) if len(text) > len(self._before) else ""

    def finish(self) -> str:
        """What is left when no token follows, broken characters included."""
        return self._give_out(len(self._ids), self._tokenizer.decode(self._ids))

    def _give_out(self, count: int, text: str) -> str:
        """Give out `text`, that of the first `count` tokens; those shown before it are no longer needed.

        The tokens last shown stay as context: some decoders treat a text's start differently.
        """
        new = text[len(self._before) :]
        del self._ids[: self._shown]
        self._shown = count - self._shown
        self._before = self._tokenizer.decode(self._ids[: self._shown])
        return new

    def _give_out_broken(self, text: str) -> str:
        """Give out all but the last tokens, up to where the text can no longer change."""
        for count in range(len(self._ids) - 4, len(self._ids) - 8, -1):
            settled = self._tokenizer.decode(self._ids[:count])
            if text.startswith(settled) and len(settled) > len(self._before):
                return self._give_out(count, settled)
        return ""


class StopStrings:
    """Holds text back that may be the start of a stop string."""

    def __init__(self, stops: list[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that may be shown, whether a stop string has been found).

        Of several, the one that is complete first ends the text, so the end does not depend on how the text came.
        """
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            first_end = min(end for end, _ in found)
            shown, self._held = self._held[: min(at for end, at in found if end == first_end)], ""
            return shown, True
        keep = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._held)), keep, -1):
                if stop.startswith(self._held[-size:]):
                    keep = size
                    break
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def finish(self) -> str:
        """What was held back, when nothing follows."""
        shown, self._held = self._held, ""
        return shown
