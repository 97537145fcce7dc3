"""A linear layer whose rows do not depend on how many others there are."""

from __future__ import annotations

import torch
import torch.nn.functional as F

LEAST_ROWS = {torch.float32: 16, torch.bfloat16: 2}


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x` [T, in] times `weight` [out, in], plus `bias` [out]: [T, out].

    On a CPU the kernel is chosen by the number of rows, and each sums in an order of its own; from so many rows on it
    is always the same. Fewer rows are padded, so that a token's result does not depend on its batch. Measured by
    bench/batch_invariance.py; see docs/decisions/0005-numerics.md.
    """
    missing = LEAST_ROWS.get(x.dtype, 0) - x.shape[0]
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    if weight.shape[0] == 1 and bias is None:  # a single output has kernels of its own, for any number of rows
        return (x.float() * weight.float()).sum(dim=-1, keepdim=True).to(x.dtype)
    if missing <= 0:
        return F.linear(x, weight, bias)
    return F.linear(F.pad(x, (0, 0, 0, missing)), weight, bias)[:-missing]
