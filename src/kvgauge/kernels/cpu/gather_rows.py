"""Chosen rows out of stored ones, in float32 and turned on their side: codes of all other rows are never read."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvgauge.kernels.cpu.library import library
from kvgauge.kernels.cpu.operators import compiled_for, pointer
from kvgauge.kernels.cpu.stored_rows import CHANNEL_CODES, StoredRows


def gather_rows(rows: StoredRows, starts: Tensor, chunk: int) -> Tensor | None:
    """Runs of adjacent rows, or None where the compiled kernel does not apply.

    Args:
        rows: plain, or in codes of tokens, without a rotation; of every head, or shared by all.
        starts: (batch, heads, chunks) int64, the first row of each run; rows below 0 are taken as row 0.
        chunk: rows of a run.

    Returns:
        (batch, heads, dim, chunks · chunk) float32.
    """
    if rows.kind == CHANNEL_CODES or rows.rotation or torch.compiler.is_compiling():
        return None
    if not compiled_for(starts, dtypes=(torch.int64,)):
        return None
    kernels = library()
    assert kernels is not None
    batch, heads, chunks = starts.shape
    own = starts.contiguous()
    out = torch.empty(batch, heads, rows.dim, chunks * chunk)
    kernels.kvgauge_gather(
        (ctypes.c_int64 * len(rows))(*rows),
        pointer(own),
        pointer(out),
        *map(ctypes.c_int64, (batch, heads, chunks, chunk)),
        ctypes.c_int(torch.get_num_threads()),
    )
    return out


def turned_rows(rows: StoredRows, batch: int) -> Tensor | None:
    """All rows that the heads share, on their side: (batch, dim, tokens) float32, or None as above."""
    turned = gather_rows(rows._replace(head_rows=0), torch.zeros(batch, 1, 1, dtype=torch.int64), rows.tokens)
    return None if turned is None else turned[:, 0]
