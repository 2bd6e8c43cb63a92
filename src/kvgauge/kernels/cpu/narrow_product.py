"""A few rows times a large matrix, at the speed of reading the matrix."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvgauge.kernels.cpu.library import library
from kvgauge.kernels.cpu.operators import OPERATORS, compiled_for, pointer, run

OPERATORS.define("narrow_product(Tensor rows, Tensor weight) -> Tensor")


def narrow_product(rows: Tensor, weight: Tensor) -> Tensor | None:
    """``rows @ weightᵀ``, (count, out), of rows (count, in) and weights (out, in); None where it does not apply.

    Products of bfloat16 numbers are added up in float32.
    """
    if not weight.is_contiguous() or not compiled_for(rows, weight):
        return None
    return run(torch.ops.kvgauge.narrow_product, _narrow_product, rows, weight)


@torch.library.impl(OPERATORS, "narrow_product", "CPU")
def _narrow_product(rows: Tensor, weight: Tensor) -> Tensor:
    kernels = library()
    assert kernels is not None
    numbers = rows.float().contiguous()
    output = torch.empty(rows.shape[0], weight.shape[0])
    kernels.kvgauge_narrow_product(
        pointer(numbers),
        pointer(weight),
        pointer(output),
        ctypes.c_int64(rows.shape[0]),
        ctypes.c_int64(weight.shape[1]),
        ctypes.c_int64(weight.shape[0]),
        ctypes.c_int(torch.get_num_threads()),
        ctypes.c_int(weight.dtype == torch.bfloat16),
    )
    return output.to(rows.dtype)


@torch.library.register_fake("kvgauge::narrow_product", lib=OPERATORS)
def _shape(rows: Tensor, weight: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[0])
