"""Packed linear layers give what the plain product gives, for every dtype, shape and layout."""

from __future__ import annotations

import pytest
import torch

from shared.linear import Linear

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("widen", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (7, 5), (48, 32), (513, 257)], ids=str)
def test_the_product_is_that_of_float64(
    shape: tuple[int, int], dtype: torch.dtype, *, biased: bool, widen: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(shape, generator=generator) / shape[1] ** 0.5).to(dtype)
    bias = torch.randn(shape[0], generator=generator).to(dtype) if biased else None
    linear = Linear(weight.clone(), bias, widen=widen)
    for rows in (0, 1, 2, 3, 16, 65):
        x = torch.randn(rows, shape[1], generator=generator).to(dtype)
        expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        y = linear(x)
        assert (y.shape, y.dtype) == ((rows, shape[0]), dtype)
        torch.testing.assert_close(y.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_an_input_that_is_not_contiguous_is_read_as_it_is_meant() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 24, generator=generator)
    wide = torch.randn(48, 6, generator=generator)
    x = wide.T[:, ::2]
    torch.testing.assert_close(Linear(weight.clone())(x), x @ weight.T)


def test_the_weight_is_not_kept_twice() -> None:
    linear = Linear(torch.randn(64, 64))
    assert linear._weight is None
    assert linear._packed is not None
