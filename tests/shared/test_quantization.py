"""Int8 weights: how far from the original, and products of theirs."""

from __future__ import annotations

import pytest
import torch

from shared.quantization import LARGEST, Int8Linear, quantize_rows


def test_an_element_is_off_by_at_most_half_a_scale_of_its_row() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 200, generator=generator) * torch.logspace(-3, 3, 64)[:, None]
    quantized, scale = quantize_rows(weight)
    assert (quantized.dtype, scale.shape) == (torch.int8, (64,))
    assert ((quantized * scale[:, None] - weight).abs() <= 0.501 * scale[:, None]).all()
    assert (scale <= 1.005 * weight.abs().amax(dim=1) / LARGEST).all()


def test_a_row_of_zeros_stays_one() -> None:
    quantized, scale = quantize_rows(torch.zeros(2, 8))
    assert not quantized.any()
    assert scale.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (7, 5), (48, 32), (513, 257)], ids=str)
def test_the_product_is_that_of_the_int8_weight(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    quantized, scale = quantize_rows(torch.randn(shape, generator=generator) / shape[1] ** 0.5)
    linear = Int8Linear(quantized, scale)
    for rows in (1, 2, 3, 16, 65):
        x = torch.randn(rows, shape[1], generator=generator).bfloat16()
        expected = x.double() @ (quantized.double() * scale.double()[:, None]).T
        y = linear(x.to(dtype))
        assert (y.shape, y.dtype) == ((rows, shape[0]), dtype)
        torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=2e-2)
