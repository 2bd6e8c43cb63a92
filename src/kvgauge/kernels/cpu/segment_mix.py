"""Weighted sums over runs of adjacent rows, turned on the way, in one pass over the rows."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvgauge.kernels.cpu.library import library
from kvgauge.kernels.cpu.operators import OPERATORS, compiled_for, pointer, run

OPERATORS.define(
    "segment_mix(Tensor rows, Tensor weights, Tensor segments, int count, Tensor? cosines, Tensor? sines) -> Tensor"
)


def segment_mix(
    rows: Tensor, weights: Tensor, segments: Tensor, count: int, turning: tuple[Tensor, Tensor] | None = None
) -> Tensor | None:
    """``Σ weight · turn(row)`` over the rows of each segment; None where the compiled kernel does not apply.

    Args:
        rows: (batch, heads, entries, dimension), a multiple of 2 if they are turned.
        weights: (batch, heads, entries), broadcast if need be; rows of weight 0 are not read.
        segments: (batch, entries), the segment of each entry, below `count` and never falling.
        count: segments; those without an entry are 0.
        turning: cosines and sines as `kvgauge.architecture.rotary.Rotary.turning` gives them; None turns nothing.

    Returns:
        (batch, heads, count, dimension) in the dtype of `rows`, summed in float32.
    """
    if weights.dtype != torch.float32 or not compiled_for(rows) or (turning and turning[0].dtype != torch.float32):
        return None
    cosines, sines = turning or (None, None)
    return run(torch.ops.kvgauge.segment_mix, _segment_mix, rows, weights, segments, count, cosines, sines)


@torch.library.impl(OPERATORS, "segment_mix", "CPU")
def _segment_mix(
    rows: Tensor, weights: Tensor, segments: Tensor, count: int, cosines: Tensor | None, sines: Tensor | None
) -> Tensor:
    kernels = library()
    assert kernels is not None
    batch, heads, entries, dimension = rows.shape
    rows = rows if rows.stride(3) == 1 else rows.contiguous()
    weights, segments = weights.expand(batch, heads, entries).contiguous(), segments.contiguous()
    angles = [
        None if part is None else part.expand(batch, 1, entries, dimension).contiguous() for part in (cosines, sines)
    ]
    out = rows.new_zeros(batch, heads, count, dimension)
    kernels.kvgauge_segment_mix(
        pointer(rows),
        pointer(weights),
        pointer(segments),
        *map(pointer, angles),
        pointer(out),
        _SIZES(batch, heads, entries, dimension, count, *rows.stride()[:3]),
        ctypes.c_int(torch.get_num_threads()),
        ctypes.c_int(rows.dtype == torch.bfloat16),
    )
    return out


_SIZES = ctypes.c_int64 * 8


@torch.library.register_fake("kvgauge::segment_mix", lib=OPERATORS)
def _shapes(
    rows: Tensor, weights: Tensor, segments: Tensor, count: int, cosines: Tensor | None, sines: Tensor | None
) -> Tensor:
    return rows.new_empty(*rows.shape[:2], count, rows.shape[3])
