"""The compiled projection of a few rows per head against float64."""

from __future__ import annotations

import pytest
import torch

from kvgauge.kernels.cpu.head_projection import MOST_ROWS, head_projection


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, MOST_ROWS])
@pytest.mark.parametrize("sizes", [(1, 1), (64, 32), (17, 5)])
def test_product_is_exact_to_rounding(sizes, count, dtype):
    torch.manual_seed(count)
    rows, matrices = torch.randn(2, 3, count, sizes[0]).to(dtype), torch.randn(3, *sizes).to(dtype)
    output = head_projection(rows, matrices)
    assert output.dtype == dtype
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(output.double(), rows.double() @ matrices.double(), **close)


def test_rows_need_not_be_contiguous():
    rows, matrices = torch.randn(2, 1, 3, 7).transpose(1, 2), torch.randn(3, 7, 4)
    torch.testing.assert_close(head_projection(rows, matrices), rows @ matrices)


@pytest.mark.parametrize("case", ["double", "gradient", "transposed", "rows"])
def test_what_it_is_not_compiled_for_is_left_to_torch(case):
    dtype = torch.float64 if case == "double" else torch.float32
    matrices = torch.randn(3, 7, 7, dtype=dtype)
    rows = torch.randn(2, 3, MOST_ROWS + 1 if case == "rows" else 1, 7, dtype=dtype)
    rows.requires_grad_(case == "gradient")
    assert head_projection(rows, matrices.mT if case == "transposed" else matrices) is None


def test_the_operator_can_be_traced():
    torch.library.opcheck(torch.ops.kvgauge.head_projection, (torch.randn(2, 3, 1, 7), torch.randn(3, 7, 4)))
