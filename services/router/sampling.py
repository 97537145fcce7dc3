"""The next tokens of a step, chosen together. A token depends on its own logits, parameters, seed and position only."""

from __future__ import annotations

import hashlib

import torch

from services.router.messages import Sampling, TokenLogprob
from services.router.sequence import Sequence

_DENOMINATOR = 2.0**53


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for the token at `position` of a generation with `seed`.

    A function, not a stream: it does not matter what else is in the batch, or which router asks.
    """
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + position.to_bytes(8, "little"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / _DENOMINATOR


def penalize(logits: torch.Tensor, sequence: Sequence) -> None:
    """Apply penalties and biases to one row of logits [V], in place.

    Presence and frequency penalties count generated tokens (OpenAI's definition); the repetition penalty counts the
    prompt too (CTRL, arXiv 1909.05858, as transformers applies it).
    """
    s = sequence.request.sampling
    if s.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*sequence.request.token_ids, *sequence.counts}), device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
    if sequence.counts and (s.presence_penalty or s.frequency_penalty):
        tokens = torch.tensor(list(sequence.counts), device=logits.device)
        counts = torch.tensor(list(sequence.counts.values()), dtype=logits.dtype, device=logits.device)
        logits[tokens] -= s.presence_penalty + s.frequency_penalty * counts
    if s.logit_bias:
        tokens = torch.tensor(list(s.logit_bias), device=logits.device)
        logits[tokens] += torch.tensor(list(s.logit_bias.values()), dtype=logits.dtype, device=logits.device)


def _needs_penalties(s: Sampling) -> bool:
    return bool(s.repetition_penalty != 1.0 or s.presence_penalty or s.frequency_penalty or s.logit_bias)


def sample(logits: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    """The next token of each sequence, from its row of `logits` [B, V] float32, which may be overwritten.

    Order: penalties and bias, temperature, top_k, top_p, min_p; then the inverse of the cumulative distribution over
    token ids.
    """
    for row, sequence in enumerate(sequences):
        if _needs_penalties(sequence.request.sampling):
            penalize(logits[row], sequence)
    tokens = logits.argmax(dim=-1)  # [B]
    rows = [i for i, s in enumerate(sequences) if s.request.sampling.temperature > 0]
    if rows:
        chosen = [sequences[i].request.sampling for i in rows]
        draws = [uniform(s.seed, sequences[i].length) for i, s in zip(rows, chosen, strict=True)]
        picked = _draw(logits[rows], chosen, torch.tensor(draws, dtype=torch.float64, device=logits.device))
        tokens[rows] = picked
    return [int(token) for token in tokens.tolist()]


def _draw(logits: torch.Tensor, params: list[Sampling], draws: torch.Tensor) -> torch.Tensor:
    """Tokens [B] for draws [B] in [0, 1) from logits [B, V]."""

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]  # [B, 1]

    vocab = logits.shape[1]
    scaled = logits.double() / column([max(s.temperature, 1e-5) for s in params])
    if all(s.top_k <= 0 and s.top_p >= 1 and s.min_p <= 0 for s in params):
        return _invert(torch.softmax(scaled, dim=-1), draws)
    values, order = scaled.sort(dim=-1, descending=True, stable=True)  # [B, V]
    rank = torch.arange(vocab, device=logits.device)
    top_k = column([float(s.top_k if 0 < s.top_k < vocab else vocab) for s in params])
    probs = torch.softmax(values.masked_fill(rank >= top_k, -torch.inf), dim=-1)
    before = probs.cumsum(dim=-1) - probs
    # The first token always stays: nothing comes before it.
    dropped = (before >= column([s.top_p for s in params])) & (rank > 0)
    dropped |= probs < column([s.min_p for s in params]) * probs[:, :1]
    # In order of token ids, not of probability: two tokens that are all but equally likely change places with the
    # last bit of a logit, and the draw between them would then depend on what else was in the batch.
    return _invert(torch.zeros_like(probs).scatter(1, order, probs.masked_fill(dropped, 0.0)), draws)


def _invert(weights: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Where draws [B] in [0, 1) fall in the cumulative distribution of `weights` [B, V] over token ids."""
    cumulative = weights.cumsum(dim=-1)
    at = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)
    # A draw that rounds onto the end must not fall behind the last token that may be chosen.
    last = torch.where(weights > 0, torch.arange(weights.shape[1], device=weights.device), 0).amax(-1, keepdim=True)
    return torch.minimum(at, last).squeeze(1)


def logprobs(logits: torch.Tensor, tokens: list[int], top: list[int]) -> list[TokenLogprob]:
    """Log-probabilities of `tokens` [B] under `logits` [B, V], with `top[i]` alternatives for row i."""
    values = torch.log_softmax(logits, dim=-1)  # [B, V]
    index = torch.tensor(tokens, device=logits.device)[:, None]
    own = values.gather(1, index)  # [B, 1]
    ranks = ((values > own).sum(dim=-1) + 1).tolist()
    most = max(top, default=0)
    best = values.topk(min(most, values.shape[1]), dim=-1) if most else None
    results = []
    for row, (token, count) in enumerate(zip(tokens, top, strict=True)):
        pairs: list[tuple[int, float]] = []
        if best is not None and count:
            ids, scores = best.indices[row, :count].tolist(), best.values[row, :count].tolist()
            pairs = list(zip(ids, scores, strict=True))
        results.append(TokenLogprob(token, float(own[row, 0]), int(ranks[row]), pairs))
    return results
