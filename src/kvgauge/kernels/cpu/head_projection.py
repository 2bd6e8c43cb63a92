"""A few rows per head times a small matrix per head: what a new token's key and value become in per-head latents."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvgauge.kernels.cpu.library import library
from kvgauge.kernels.cpu.operators import OPERATORS, compiled_for, pointer, run

MOST_ROWS = 4  # of a head and a sequence; BLAS pays off beyond: it wakes its threads even for a handful of rows

OPERATORS.define("head_projection(Tensor rows, Tensor matrices) -> Tensor")


def head_projection(rows: Tensor, matrices: Tensor) -> Tensor | None:
    """``rows @ matrices``, (batch, heads, count, out) of rows (batch, heads, count, in) and matrices (heads, in, out),
    or None where the compiled kernel does not apply."""
    if rows.shape[2] > MOST_ROWS or not matrices.is_contiguous() or not compiled_for(rows, matrices):
        return None
    return run(torch.ops.kvgauge.head_projection, _head_projection, rows, matrices)


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
