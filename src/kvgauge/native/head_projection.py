"""A few rows per head times a small matrix per head: what a new token's key and value become in per-head latents."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvgauge.native.library import available, library
from kvgauge.native.operators import OPERATORS, pointer

MOST_ROWS = 4  # of a head and a sequence; BLAS pays off beyond: it wakes its threads even for a handful of rows

OPERATORS.define("head_projection(Tensor rows, Tensor matrices) -> Tensor")


def head_projection(rows: Tensor, matrices: Tensor) -> Tensor | None:
    """``rows @ matrices``, (batch, heads, count, out) of rows (batch, heads, count, in) and matrices (heads, in, out),
    or None where the compiled kernel does not apply."""
    if (
        rows.shape[2] > MOST_ROWS
        or rows.device.type != "cpu"
        or rows.dtype not in (torch.float32, torch.bfloat16)
        or matrices.dtype != rows.dtype
        or not matrices.is_contiguous()
        or (torch.is_grad_enabled() and (rows.requires_grad or matrices.requires_grad))
        or not available()
    ):
        return None
    if torch.compiler.is_compiling():
        projected: Tensor = torch.ops.kvgauge.head_projection(rows, matrices)
        return projected
    return _head_projection(rows, matrices)


@torch.library.impl(OPERATORS, "head_projection", "CPU")
def _head_projection(rows: Tensor, matrices: Tensor) -> Tensor:
    kernels = library()
    assert kernels is not None
    batch, heads, count, size = rows.shape
    own = rows.float().contiguous()
    output = torch.empty(batch, heads, count, matrices.shape[2])
    kernels.kvgauge_project(
        pointer(own),
        pointer(matrices),
        pointer(output),
        *map(ctypes.c_int64, (batch * heads, heads, count, size, matrices.shape[2])),
        ctypes.c_int(rows.dtype == torch.bfloat16),
    )
    return output.to(rows.dtype)


@torch.library.register_fake("kvgauge::head_projection", lib=OPERATORS)
def _shape(rows: Tensor, matrices: Tensor) -> Tensor:
    return rows.new_empty(*rows.shape[:3], matrices.shape[2])
