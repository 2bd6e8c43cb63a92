"""A few rows times a large matrix, at the speed of reading the matrix."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvgauge.native.library import available, library
from kvgauge.native.operators import OPERATORS, pointer

OPERATORS.define("narrow_product(Tensor rows, Tensor weight) -> Tensor")


def narrow_product(rows: Tensor, weight: Tensor) -> Tensor | None:
    """``rows @ weightᵀ``, (count, out) of rows (count, in) and weights (out, in) in float32, or None where the compiled
    kernel does not apply."""
    if (
        rows.device.type != "cpu"
        or rows.dtype != torch.float32
        or weight.dtype != torch.float32
        or not weight.is_contiguous()
        or (torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad))
        or not available()
    ):
        return None
    if torch.compiler.is_compiling():
        product: Tensor = torch.ops.kvgauge.narrow_product(rows, weight)
        return product
    return _narrow_product(rows, weight)


@torch.library.impl(OPERATORS, "narrow_product", "CPU")
def _narrow_product(rows: Tensor, weight: Tensor) -> Tensor:
    kernels = library()
    assert kernels is not None
    rows = rows.contiguous()
    output = torch.empty(rows.shape[0], weight.shape[0])
    kernels.kvgauge_narrow_product(
        pointer(rows),
        pointer(weight),
        pointer(output),
        ctypes.c_int64(rows.shape[0]),
        ctypes.c_int64(weight.shape[1]),
        ctypes.c_int64(weight.shape[0]),
        ctypes.c_int(torch.get_num_threads()),
    )
    return output


@torch.library.register_fake("kvgauge::narrow_product", lib=OPERATORS)
def _shape(rows: Tensor, weight: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[0])
