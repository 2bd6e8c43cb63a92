"""The softmax of a block of attention scores and its column sums, in one pass over the block."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvgauge.kernels.cpu.library import library
from kvgauge.kernels.cpu.operators import OPERATORS, compiled_for, pointer, run

OPERATORS.define(
    "counting_softmax(Tensor(a!) scores, Tensor(b!) sums, Tensor? bias, Tensor? counts, int queries) -> ()"
)


def counting_softmax(scores: Tensor, sums: Tensor, bias: Tensor | None, counts: Tensor | None, queries: int) -> bool:
    """Replace `scores` by their softmax and add its column sums to `sums`; False where the kernel does not apply.

    Args:
        scores: (batch, num_key_value_heads, group · queries, entries), contiguous. The last query of each head of a
            group belongs to the last entry; entries behind a query's own become 0.
        sums: (batch, num_key_value_heads, entries) in float32.
        bias: (batch, entries) in float32, added to the scores; None: nothing.
        counts: (batch, queries) in float32, how often a query counts in `sums`; None: once.
        queries: of one head.
    """
    if not scores.is_contiguous() or sums.dtype != torch.float32 or not compiled_for(scores):
        return False
    run(torch.ops.kvgauge.counting_softmax, _counting_softmax, scores, sums, bias, counts, queries)
    return True


@torch.library.impl(OPERATORS, "counting_softmax", "CPU")
def _counting_softmax(scores: Tensor, sums: Tensor, bias: Tensor | None, counts: Tensor | None, queries: int) -> None:
    kernels = library()
    assert kernels is not None
    batch, heads, rows, entries = scores.shape
    assert sums.stride(2) == 1 and sums.stride(0) == heads * sums.stride(1)
    kernels.kvgauge_counting_softmax(
        pointer(scores),
        pointer(bias),
        pointer(counts),
        pointer(sums),
        _SIZES(
            *(batch, heads, rows // queries, queries, entries),
            *(0 if bias is None else bias.stride(0), 0 if counts is None else counts.stride(0), sums.stride(1)),
        ),
        ctypes.c_int(torch.get_num_threads()),
        ctypes.c_int(scores.dtype == torch.bfloat16),
    )


_SIZES = ctypes.c_int64 * 8
