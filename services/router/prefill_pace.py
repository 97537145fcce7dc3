"""How many prompt tokens join the steps in which others decode. A pure core: it is told how long steps took.

Chunked prefill (Sarathi-Serve, arXiv 2403.02310) bounds how long a prompt holds the others up by a number of tokens.
How long those take depends on the model and the machine, so here the number follows from what steps were seen to take.
"""

from __future__ import annotations

STRETCH = 2.0
"""A step with prompt tokens may take so many times as long as one without, where most sequences decode."""
LEAST_TOKENS = 16
WEIGHT = 0.2
"""Of a new observation in the running means."""


class PrefillPace:
    """Gives each step's budget of prompt tokens, between LEAST_TOKENS and `most`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._decode_seconds: float | None = None
        """Of a step without prompt tokens."""
        self._token_seconds: float | None = None
        """What a prompt token adds to a step."""

    def budget(self, *, decoding: int, prefilling: int) -> int:
        """Prompt tokens for the next step of so many sequences.

        Where more wait for their prompt than decode, as at the start of a burst, the few give way to the many.
        """
        if not decoding or self._decode_seconds is None or self._token_seconds is None:
            return self._most
        tokens = (STRETCH - 1) * self._decode_seconds / self._token_seconds * max(1.0, prefilling / decoding)
        return int(min(self._most, max(min(LEAST_TOKENS, self._most), tokens)))

    def observe(self, decode_tokens: int, prompt_tokens: int, seconds: float) -> None:
        """Take note of a step over so many tokens of both kinds."""
        if not prompt_tokens:
            self._decode_seconds = _mean(self._decode_seconds, seconds)
            return
        if decode_tokens and self._decode_seconds is None:
            return
        own = seconds - (self._decode_seconds or 0.0) if decode_tokens else seconds
        self._token_seconds = _mean(self._token_seconds, max(own, 1e-6) / prompt_tokens)


def _mean(mean: float | None, value: float) -> float:
    return value if mean is None else mean + WEIGHT * (value - mean)
