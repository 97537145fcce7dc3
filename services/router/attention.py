"""Attention over the paged KV cache, with grouped query heads and sliding windows."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from services.router.batch import Batch, Context
from shared.linear import has_native_bfloat16

TILE_ROWS = 4
"""In float32 torch's product has kernels of its own for what is left of its rows beyond a multiple of this, and sums
there in another order: measured on a CPU of AMD's; on one of Intel's, for a single row."""


def working_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What attention computes in, and the KV cache holds, for a model of `dtype`.

    float32 in bfloat16's place on a CPU without bfloat16 of its own: its kernels are several times slower there, and
    so is converting the whole context in every step. The numbers are the same.
    """
    slow = dtype is torch.bfloat16 and device.type == "cpu" and not has_native_bfloat16()
    return torch.float32 if slow else dtype


def _read(cache: torch.Tensor, context: Context) -> torch.Tensor:
    """The context's L slots of `cache` [slots, kv_heads, D]: [1, kv_heads, L, D]."""
    # index_select copies whole slots; indexing with a tensor takes three times as long.
    read = torch.index_select(cache.view(cache.shape[0], -1), 0, context.slots).view(-1, *cache.shape[1:])
    return read.transpose(0, 1).unsqueeze(0)


def _whole_tiles(rows: torch.Tensor) -> torch.Tensor:
    """`rows` [..., n, D], with rows of zeros after them until n is a multiple of TILE_ROWS, where that matters."""
    missing = -rows.shape[-2] % TILE_ROWS
    if not missing or rows.dtype is not torch.float32 or rows.device.type != "cpu":
        return rows
    return F.pad(rows, (0, 0, 0, missing))


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
        [T, heads × D] in query's dtype.

    """
    heads, dim = query.shape[1:]
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    dtype, device = keys.dtype, query.device
    given, query = query.dtype, query.to(dtype)
    parts: list[torch.Tensor] = []  # [n, heads, D] each, in the rows' order
    decodes = [c for c in batch.contexts if c.count == 1]
    if decodes:
        count = len(decodes)
        # The heads that share keys are the rows of one product.
        q = _whole_tiles(query[:count].view(count, kv_heads, group, dim))
        ys = [
            F.scaled_dot_product_attention(
                each, _read(keys, c), _read(values, c), attn_mask=c.mask(window, dtype, device)
            )
            for each, c in zip(torch.split(q, 1), decodes, strict=True)
        ]
        parts.append(torch.cat(ys)[:, :, :group].reshape(count, heads, dim))
    for c in batch.contexts[len(decodes) :]:
        own = query[c.row : c.row + c.count]  # [n, heads, D]
        k, v = _read(keys, c), _read(values, c)
        if c.is_whole and window is None:
            q = _whole_tiles(own.transpose(0, 1).unsqueeze(0))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group > 1)[:, :, : c.count]
        else:
            q = own.view(c.count, kv_heads, group, dim).permute(1, 2, 0, 3).reshape(1, kv_heads, group * c.count, dim)
            mask = c.mask(window, dtype, device)
            q, mask = _whole_tiles(q), _whole_tiles(mask.repeat(group, 1) if group > 1 else mask)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[:, :, : group * c.count]
            y = y.reshape(1, heads, c.count, dim)
        parts.append(y.squeeze(0).transpose(0, 1))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1).to(given)
