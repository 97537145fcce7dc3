"""Weight-only int8: one symmetric scale per output, made while loading."""

from __future__ import annotations

import torch
import torch.nn.functional as F

LARGEST = 127
PIECE_ROWS = 64
UNIT = 32
"""Torch's int8 kernel reads beyond the end of sizes that are no multiple of its blocks."""


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 [out, in], scale [out] float32) of `weight` [out, in], so that weight is about int8 * scale.

    An element is off by at most half a scale: about 1/254 of the largest of its row. Source: LLM.int8() (arXiv
    2208.07339), vector-wise quantization; here of the weights only.
    """
    scale = (weight.abs().amax(dim=1).float() / LARGEST).bfloat16().float()  # [out]; as torch's own kernel takes them
    scale[scale == 0] = 1.0
    quantized = torch.empty(weight.shape, dtype=torch.int8)
    for start in range(0, weight.shape[0], PIECE_ROWS):  # as float32, the whole would be four times as large
        part = slice(start, start + PIECE_ROWS)
        quantized[part] = (weight[part] / scale[part, None]).round_().clamp_(-LARGEST, LARGEST)
    return quantized, scale


class Int8Linear:
    """As `Linear`, with an int8 weight; activations are rounded to bfloat16, sums are float32."""

    def __init__(self, quantized: torch.Tensor, scale: torch.Tensor) -> None:
        """Take what `quantize_rows` gives."""
        outputs, self._missing = quantized.shape[0], -quantized.shape[1] % UNIT
        self._outputs = outputs
        self._weight = F.pad(quantized, (0, self._missing, 0, -outputs % UNIT))
        self._scale = F.pad(scale.bfloat16(), (0, -outputs % UNIT))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in] -> [T, out], in x's dtype."""
        given = x.bfloat16()
        if self._missing:
            given = F.pad(given, (0, self._missing))
        y: torch.Tensor = torch._weight_int8pack_mm(given.contiguous(), self._weight, self._scale)  # noqa: SLF001
        return y[:, : self._outputs].to(x.dtype)
