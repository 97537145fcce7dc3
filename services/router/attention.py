"""Attention over the paged KV cache, with grouped query heads and sliding windows."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from services.router.batch import Batch
from shared.linear import has_native_bfloat16


def working_dtype(query: torch.Tensor) -> torch.dtype:
    """What attention computes in: float32 in bfloat16's place on a CPU without bfloat16 of its own."""
    slow = query.dtype is torch.bfloat16 and query.device.type == "cpu" and not has_native_bfloat16()
    return torch.float32 if slow else query.dtype


def _read(cache: torch.Tensor, context: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The slots `context` [...] of `cache` [slots, kv_heads, D]: [..., kv_heads, D]."""
    # index_select copies whole slots; indexing with a tensor takes three times as long.
    read = torch.index_select(cache.view(cache.shape[0], -1), 0, context.flatten()).to(dtype)
    return read.view(*context.shape, *cache.shape[1:])


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch, window: int | None
) -> torch.Tensor:
    """Attend each row of the batch to its own sequence's past.

    Args:
        query: [T, heads, D], rotated.
        keys: [slots, kv_heads, D], this layer's cache, with this step's keys written.
        values: likewise.
        batch: which rows belong together and which slots they see.
        window: how many positions back a row sees, itself included; None: all.

    Returns:
        [T, heads × D].

    """
    out = torch.empty_like(query)
    dtype = working_dtype(query)
    query = query.to(dtype)
    if batch.decode is not None:
        d = batch.decode
        count = d.context.shape[0]
        mask = d.valid  # [B, L]
        if window is not None:
            mask = mask & (torch.arange(mask.shape[1], device=mask.device) >= (d.lengths - window)[:, None])
        k = _read(keys, d.context, dtype).transpose(1, 2)  # [B, kv, L, D]
        v = _read(values, d.context, dtype).transpose(1, 2)
        # In float32 one row has a kernel of its own; as two it is summed as the rows of a prefill are.
        copies = 2 if dtype is torch.float32 else 1
        q = query[:count].unsqueeze(2).repeat(1, 1, copies, 1)  # [B, heads, copies, D]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :], enable_gqa=True)
        out[:count] = y[:, :, 0]
    for p in batch.prefills:
        rows = slice(p.row, p.row + p.count)
        length = p.context.shape[0]
        q = query[rows].transpose(0, 1).unsqueeze(0)  # [1, heads, n, D]
        k = _read(keys, p.context, dtype).transpose(0, 1).unsqueeze(0)  # [1, kv, L, D]
        v = _read(values, p.context, dtype).transpose(0, 1).unsqueeze(0)
        if length == p.count and not p.start and window is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            columns = torch.arange(length, device=query.device)
            at = columns[p.start : p.start + p.count, None]
            visible = columns <= at  # [n, L]
            if window is not None:
                visible = visible & (columns > at - window)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
        out[rows] = y.squeeze(0).transpose(0, 1)
    return out.flatten(1)
