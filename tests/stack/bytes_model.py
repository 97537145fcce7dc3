"""A tiny random checkpoint in which every byte is a token: it can say anything, broken characters included."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.oracle import make_checkpoint

_SPECIAL = ("<pad>", "<eos>")
VOCAB = 256 + len(_SPECIAL)


def _names() -> list[str]:
    """The byte-level alphabet's letter of each byte, 0 to 255 (the scheme of GPT-2's tokenizer)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def token(byte: int) -> int:
    """The token that is this byte."""
    return len(_SPECIAL) + byte


def tokens(text: str) -> list[int]:
    return [token(byte) for byte in text.encode()]


def text_of(token_ids: list[int]) -> str:
    """The text of such tokens; broken characters become U+FFFD, as Unicode recommends."""
    return bytes(t - len(_SPECIAL) for t in token_ids if t >= len(_SPECIAL)).decode(errors="replace")


def make_bytes_checkpoint(path: Path) -> Path:
    make_checkpoint(path, "mixtral", vocab_size=VOCAB)
    names = _names()
    assert sorted(names) == sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate([*_SPECIAL, *names])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>").save_pretrained(path)
    return path
