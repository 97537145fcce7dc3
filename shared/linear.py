"""Linear layers prepared for where they run, whose rows do not depend on how many others there are."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

LEAST_ROWS = 2
"""A single row has kernels of its own. As two it is summed as the rows of any larger batch are."""
PACKED_DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def has_native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself; if not, its kernels for it are several times slower than float32's.

    Source: the instruction sets AVX512_BF16 and AMX-BF16 (Intel SDM, CPUID leaf 7).
    """
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


class Linear:
    """`x` [T, in] times a weight [out, in], plus a bias [out]: [T, out], in x's dtype.

    On a CPU the weight is laid out once for oneDNN's kernels, which read it faster than torch's own and sum each row in
    the same order whatever the number of rows, from two on; so a token's result does not depend on its batch. Measured
    by bench/batch_invariance.py; see docs/decisions/0005-numerics.md and docs/performance.md.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, widen: bool = False) -> None:
        """Prepare `weight`, which is copied if it `packs`, and kept if not.

        Args:
            weight: [out, in], float32, bfloat16 or float16.
            bias: [out], of the same dtype.
            widen: keep a bfloat16 weight as float32 where the CPU cannot multiply bfloat16 itself: twice the memory
                for several times the speed. Products are summed in float32 and rounded to bfloat16 either way.

        """
        self._bias = bias
        self._weight: torch.Tensor | None = weight
        self._packed: torch.Tensor | None = None
        self._widened = False
        if not self.packs(weight, bias):
            return
        if widen and weight.dtype is torch.bfloat16 and not has_native_bfloat16():
            self._widened = True
            weight = weight.float()
            self._bias = None if bias is None else bias.float()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight)  # noqa: SLF001 - what torch.compile itself calls
        self._weight = None

    @staticmethod
    def packs(weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
        """Whether a weight like this is laid out anew."""
        single = weight.shape[0] == 1 and bias is None
        return weight.device.type == "cpu" and weight.dtype in PACKED_DTYPES and not single

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed is None:
            return self._plain(x)
        rows = x.shape[0]
        given = x.float() if self._widened else x
        if rows < LEAST_ROWS:
            given = F.pad(given, (0, 0, 0, LEAST_ROWS - rows))
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(given, self._packed, self._bias, "none", [], "")  # noqa: SLF001
        return y[:rows].to(x.dtype)

    def _plain(self, x: torch.Tensor) -> torch.Tensor:
        assert self._weight is not None  # noqa: S101 - kept, as nothing was packed
        if x.device.type == "cpu" and self._weight.shape[0] == 1 and self._bias is None:
            # A single output has kernels of its own, for any number of rows.
            return (x.float() * self._weight.float()).sum(dim=-1, keepdim=True).to(x.dtype)
        return F.linear(x, self._weight, self._bias)
