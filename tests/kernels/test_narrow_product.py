"""The compiled product of a few rows against float64."""

from __future__ import annotations

import pytest
import torch

from kvgauge.kernels.cpu.narrow_product import narrow_product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [*range(1, 9), 11, 16])
@pytest.mark.parametrize("shape", [(1, 1), (25, 24), (70, 33), (24, 576)])
def test_product_is_exact_to_rounding(count, shape, dtype):
    torch.manual_seed(count)
    rows, weight = torch.randn(count, shape[1]).to(dtype), torch.randn(*shape).to(dtype)
    output = narrow_product(rows, weight)
    assert output.is_contiguous() and output.dtype == dtype
    close = 1e-4 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(output.double(), rows.double() @ weight.double().T, rtol=close, atol=close)


def test_rows_need_not_be_contiguous():
    rows, weight = torch.randn(7, 3).T, torch.randn(9, 7)
    torch.testing.assert_close(narrow_product(rows, weight), rows @ weight.T)


@pytest.mark.parametrize("case", ["double", "gradient", "transposed"])
def test_what_it_is_not_compiled_for_is_left_to_torch(case):
    dtype = torch.float64 if case == "double" else torch.float32
    weight = torch.randn(9, 7, dtype=dtype)
    if case == "transposed":
        weight = torch.randn(7, 9).T
    assert narrow_product(torch.randn(3, 7, dtype=dtype).requires_grad_(case == "gradient"), weight) is None


def test_the_operator_can_be_traced():
    torch.library.opcheck(torch.ops.kvgauge.narrow_product, (torch.randn(3, 7), torch.randn(9, 7)))
