"""Attention of one query per head to tokens in the forms in which they are stored, in one pass over them.

Runs of tokens that are kept differently (exact sinks, packed codes of latents, an exact tail) are attended to in one
call: codes are dequantised in registers, and the runs are joined by their normalisers, which come back too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvgauge.architecture.scaling import Scaling
from kvgauge.kernels.cpu.library import library
from kvgauge.kernels.cpu.operators import compiled_for, pointer
from kvgauge.kernels.cpu.stored_rows import StoredRows, flat

NAME = "kvgauge::stored_attention"  # in the table of a profiler


class StoredRun(NamedTuple):
    """A run of tokens.

    Attributes:
        keys, values: in one piece or in several, one after another; codes come first.
        asking: rows (query_dim, rank_k) of every key/value head: keys are asked with ``query @ rows``; None asks with
            the query.
        expansion: rows (output_dim, rank_v) of every key/value head: sums become ``sums @ rowsᵀ``; None leaves them.
        shared: all heads of the model ask the same rows.
    """

    keys: Sequence[StoredRows]
    values: Sequence[StoredRows]
    asking: StoredRows | None = None
    expansion: StoredRows | None = None
    shared: bool = False

    @property
    def output_dim(self) -> int:
        """Numbers of an output."""
        if self.expansion is None:
            return self.values[0].rotated or self.values[0].dim
        return self.expansion.head_rows or self.expansion.tokens

    def words(self) -> list[int]:
        """What the kernel reads: see ``runs_of``."""
        ends = [rows for rows in (self.asking, self.expansion) if rows is not None]
        kinds = (len(self.keys), len(self.values), self.asking is not None, self.expansion is not None)
        return [int(self.shared), *map(int, kinds), *flat(self.keys), *flat(self.values), *flat(ends)]


def stored_attention(
    query: Tensor, runs: Sequence[StoredRun], output_dim: int, scaling: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """The attention output and its log-normalisers, or None where the compiled kernel does not apply.

    Args:
        query: (batch, num_key_value_heads, group, query_dim).
        runs: of tokens, in the order of the mask; none without tokens.
        output_dim: numbers of an output.
        scaling: factor on the scores, or a `Scaling`: its soft cap is applied, its sinks are left to the caller.
        mask: (batch, tokens of all runs), as in `kvgauge.kernels.cpu.decode_attention.decode_attention`.

    Returns:
        (batch, num_key_value_heads, group, output_dim) in the dtype of `query`, and (batch, num_key_value_heads, group)
        in float32.
    """
    if torch.compiler.is_compiling() or not compiled_for(query):
        return None  # a graph cannot hold addresses
    if torch.autograd._profiler_enabled():
        with torch.profiler.record_function(NAME):
            return _attend(query, runs, output_dim, scaling, mask)
    return _attend(query, runs, output_dim, scaling, mask)


def _attend(
    query: Tensor, runs: Sequence[StoredRun], output_dim: int, scaling: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    kernels = library()
    assert kernels is not None
    batch, heads, group, query_dim = query.shape
    asked = query.float().contiguous()
    seen = None if mask is None else mask.contiguous()
    counts = seen if seen is not None and seen.dtype != torch.bool else None
    assert counts is None or counts.dtype == torch.int32
    words = [word for one in runs for word in one.words()]
    output, lse = torch.empty(batch, heads, group, output_dim), torch.empty(batch, heads, group)
    kernels.kvgauge_attend_stored(
        pointer(asked),
        pointer(seen if counts is None else None),
        pointer(counts),
        pointer(output),
        pointer(lse),
        _SIZES(batch, heads, group, query_dim, output_dim, len(runs), 0 if seen is None else seen.stride(0)),
        (ctypes.c_int64 * len(words))(*words),
        ctypes.c_float(scaling),
        ctypes.c_float(Scaling.of(scaling).softcap or 0.0),
        ctypes.c_int(torch.get_num_threads()),
    )
    return output.to(query.dtype), lse


_SIZES = ctypes.c_int64 * 7
