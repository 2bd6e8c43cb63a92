"""Attention of one query per head to many cached tokens, in one pass over the cache.

Softmax attention in the form that decoding needs: queries of a group read the same keys and values, stored with the
tokens of a dimension side by side. The normaliser comes back too, so that attention to several runs of tokens can be
joined (as flash decoding joins blocks): with outputs ``o_i`` and log-normalisers ``l_i`` the whole is
``Σ_i softmax(l)_i o_i``.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvgauge.architecture.scaling import Scaling
from kvgauge.kernels.cpu.library import library
from kvgauge.kernels.cpu.operators import OPERATORS, compiled_for, pointer, run

MOST_GROUPED = 8  # queries that read the same keys; larger groups are fast enough as products of matrices

# An independent task reads runs of so many bytes where there are tasks enough for every core, else of so few tokens.
LONG_RUN_BYTES, SHORT_BLOCK = 4096, 512
ENOUGH_TASKS = 32

OPERATORS.define(
    "decode_attention(Tensor query, Tensor keys, Tensor values, Tensor? asking, Tensor? expansion, float scaling, "
    "float softcap, Tensor? sinks, Tensor? mask, bool counting) -> (Tensor, Tensor, Tensor)"
)


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    *,
    asking: Tensor | None = None,
    expansion: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """The attention output and its log-normalisers, or None where the compiled kernel does not apply.

    Args:
        query: (batch, num_key_value_heads, group, query_dim).
        keys, values: (batch, num_key_value_heads, tokens, rank_k) and (…, rank_v), views of storage in which the tokens
            of a dimension stand side by side.
        scaling: factor on the scores, or a `Scaling`: its soft cap is applied, its sinks are left to who joins outputs.
        mask: (batch, tokens), False hides a token; or int32, how many tokens each entry stands for, 0 for none; None
            hides none.
        asking: (num_key_value_heads, query_dim, rank_k), contiguous: keys are asked with ``query @ asking``; None asks
            with the query.
        expansion: (num_key_value_heads, output_dim, rank_v), contiguous: weighted sums of the values are expanded by
            ``@ expansionᵀ``; None leaves them.

    Returns:
        (batch, num_key_value_heads, group, output_dim) in the dtype of `query`, and (batch, num_key_value_heads, group)
        in float32.
    """
    if not applies(query, keys, values):
        return None
    softcap = Scaling.of(scaling).softcap or 0.0
    arguments = (query, keys, values, asking, expansion, float(scaling), softcap, None, mask, False)
    output, lse, _ = run(torch.ops.kvgauge.decode_attention, _decode_attention, *arguments)
    return output, lse


def counted_decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """The attention output, and what each entry received of its group: the column sums of the softmax.

    Args:
        query, keys, values, mask: as in `decode_attention`.
        scaling: factor on the scores, or a `Scaling`, all of which is applied.

    Returns:
        (batch, num_key_value_heads, group, rank_v) in the dtype of `query`, and (batch, num_key_value_heads, tokens) in
        float32; None where the compiled kernel does not apply.
    """
    if not applies(query, keys, values):
        return None
    full = Scaling.of(scaling)
    sinks = None if full.sinks is None else full.sinks.float().contiguous()
    arguments = (query, keys, values, None, None, float(scaling), full.softcap or 0.0, sinks, mask, True)
    output, _, received = run(torch.ops.kvgauge.decode_attention, _decode_attention, *arguments)
    return output, received


def applies(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """The kernel can take these tensors: see `decode_attention` for their layout."""
    return (
        keys.stride(2) == values.stride(2) == 1
        and keys.shape[2] > 0
        and query.shape[2] <= MOST_GROUPED
        and compiled_for(query, keys, values)
    )


@torch.library.impl(OPERATORS, "decode_attention", "CPU")
def _decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    asking: Tensor | None,
    expansion: Tensor | None,
    scaling: float,
    softcap: float,
    sinks: Tensor | None,
    mask: Tensor | None,
    counting: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = library()
    assert kernels is not None
    batch, heads, group, query_dim = query.shape
    tokens, rank_v = values.shape[2:]
    output_dim = rank_v if expansion is None else expansion.shape[1]
    asked = query.float().contiguous()
    seen = None if mask is None else mask.contiguous()
    seen_stride = 0 if seen is None else seen.stride(0)
    counts = seen if seen is not None and seen.dtype != torch.bool else None
    assert counts is None or counts.dtype == torch.int32
    output = torch.empty(batch, heads, group, output_dim)
    lse = torch.empty(batch, heads, group)
    received = torch.empty(batch, heads, tokens if counting else 0)
    long_block = LONG_RUN_BYTES // keys.element_size()
    block = long_block if batch * heads * tokens >= ENOUGH_TASKS * long_block else SHORT_BLOCK
    key_strides, value_strides = keys.stride(), values.stride()
    failed = kernels.kvgauge_attend(
        pointer(asked),
        pointer(keys),
        pointer(values),
        pointer(asking),
        pointer(expansion),
        pointer(seen if counts is None else None),
        pointer(counts),
        pointer(output),
        pointer(lse),
        pointer(received if counting else None),
        _SIZES(batch, heads, group, query_dim, output_dim, keys.shape[3], rank_v, tokens, block),
        _STRIDES(
            *(key_strides[0], key_strides[1], key_strides[3]),
            *(value_strides[0], value_strides[1], value_strides[3]),
            *(seen_stride, seen_stride),
        ),
        ctypes.c_float(scaling),
        ctypes.c_float(softcap),
        pointer(sinks),
        ctypes.c_int(torch.get_num_threads()),
        ctypes.c_int(keys.dtype == torch.bfloat16),
    )
    assert not failed
    return output.to(query.dtype), lse, received


_SIZES, _STRIDES = ctypes.c_int64 * 9, ctypes.c_int64 * 8


@torch.library.register_fake("kvgauge::decode_attention", lib=OPERATORS)
def _shapes(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    asking: Tensor | None,
    expansion: Tensor | None,
    scaling: float,
    softcap: float,
    sinks: Tensor | None,
    mask: Tensor | None,
    counting: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, group, _ = query.shape
    output_dim = values.shape[3] if expansion is None else expansion.shape[1]
    return (
        query.new_empty(batch, heads, group, output_dim),
        query.new_empty(batch, heads, group, dtype=torch.float32),
        query.new_empty(batch, heads, keys.shape[2] if counting else 0, dtype=torch.float32),
    )
