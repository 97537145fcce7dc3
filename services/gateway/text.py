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

REPLACEMENT = "\ufffd"
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
        config: dict[str, Any] = {}
        config_file = path / "tokenizer_config.json"
        if config_file.exists():
            try:
                config = json.loads(config_file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{config_file} is damaged: {error}") from None
        source = config.get("chat_template")
        if isinstance(source, list):
            source = next((t["template"] for t in source if t.get("name") == "default"), None)
        if (path / "chat_template.jinja").exists():
            source = (path / "chat_template.jinja").read_text(encoding="utf-8")
        variables = {}
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            value = config.get(name)
            variables[name] = value.get("content") if isinstance(value, dict) else value or ""
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
        except (TypeError, ValueError, KeyError, ArithmeticError) as error:
            raise MoeError("invalid_request", f"the chat template failed: {error}", param="messages") from None


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
        self._shown = 0
        self._start = 0

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is still open."""
        self._ids.append(token)
        before = self._tokenizer.decode(self._ids[self._start : self._shown])
        text = self._tokenizer.decode(self._ids[self._start :])
        if text.endswith(REPLACEMENT) or len(text) <= len(before):
            return ""
        # The tokens last shown stay as context: some decoders treat a text's start differently.
        self._start, self._shown = self._shown, len(self._ids)
        return text[len(before) :]

    def finish(self) -> str:
        """What is left when no token follows, broken characters included."""
        before = self._tokenizer.decode(self._ids[self._start : self._shown])
        text = self._tokenizer.decode(self._ids[self._start :])
        self._shown = len(self._ids)
        return text[len(before) :]


class StopStrings:
    """Holds text back that may be the start of a stop string."""

    def __init__(self, stops: list[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that may be shown, whether a stop string has been found)."""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
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
