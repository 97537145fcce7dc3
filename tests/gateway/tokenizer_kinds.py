"""Tokenizers of the kinds that checkpoints bring: bytes in GPT-2's alphabet, and Llama's pieces with byte fallback."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from services.gateway.text import TextTokenizer
from shared.settings import DEMO_MODEL


def byte_backend() -> Tokenizer:
    """Every byte is a token; `<eos>` is special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(["<eos>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return tokenizer


def fallback_backend() -> Tokenizer:
    """A few pieces that begin words, and bytes for everything else; the decoder drops the text's first space."""
    pieces = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        *"abcdefghijklmnop",
        "\u2581a",
        "ab",
        "\u2581ab",
    ]
    merges = [("\u2581", "a"), ("a", "b"), ("\u2581a", "b")]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def tokenizer(kind: str) -> TextTokenizer:
    """The tokenizer called `demo`, `bytes` or `fallback`."""
    if kind == "demo":
        return TextTokenizer.open(DEMO_MODEL)
    return TextTokenizer(byte_backend() if kind == "bytes" else fallback_backend(), None, {})


KINDS = ("demo", "bytes", "fallback")
