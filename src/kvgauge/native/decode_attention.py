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

from kvgauge.native.library import available, library
from kvgauge.native.operators import OPERATORS, pointer

MOST_GROUPED = 8  # queries that read the same keys; larger groups are fast enough as products of matrices

# Tokens of an independent task: long runs are read faster, and every core wants some.
LONG_BLOCK, SHORT_BLOCK = 2048, 512
ENOUGH_TASKS = 32

OPERATORS.define(
    "decode_attention(Tensor query, Tensor keys, Tensor values, float scaling, Tensor? mask) -> (Tensor, Tensor)"
)


def decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """The attention output and its log-normalisers, or None where the compiled kernel does not apply.

    Args:
        query: (batch, num_key_value_heads, group, rank_k).
        keys, values: (batch, num_key_value_heads, tokens, rank_k) and (…, rank_v), views of storage in which the tokens
            of a dimension stand side by side.
        scaling: factor on the scores.
        mask: (batch, tokens), False hides a token; None hides none.

    Returns:
        (batch, num_key_value_heads, group, rank_v) in the dtype of `query`, and (batch, num_key_value_heads, group) in
        float32.
    """
    if not applies(query, keys, values):
        return None
    return torch.ops.kvgauge.decode_attention(query, keys, values, scaling, mask)


def applies(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """The kernel is compiled for these tensors, and no gradient is asked of it."""
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.bfloat16)
        and keys.dtype == values.dtype == query.dtype
        and query.shape[2] <= MOST_GROUPED
        and keys.stride(2) == values.stride(2) == 1
        and keys.shape[2] > 0
        and not (torch.is_grad_enabled() and (query.requires_grad or keys.requires_grad or values.requires_grad))
        and available()
    )


@torch.library.impl(OPERATORS, "decode_attention", "CPU")
def _decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    kernels = library()
    assert kernels is not None
    batch, heads, group, rank_k = query.shape
    tokens, rank_v = values.shape[2:]
    asked = query.float().contiguous()
    mixed = torch.empty(batch, heads, group, rank_v)
    lse = torch.empty(batch, heads, group)
    seen = None if mask is None else mask.contiguous()
    long = batch * heads * tokens >= ENOUGH_TASKS * LONG_BLOCK
    failed = kernels.kvgauge_attend(
        pointer(asked),
        pointer(keys),
        pointer(values),
        pointer(seen),
        pointer(mixed),
        pointer(lse),
        *map(ctypes.c_int64, (batch, heads, group, rank_k, rank_v, tokens, LONG_BLOCK if long else SHORT_BLOCK)),
        _strides(keys),
        _strides(values),
        ctypes.c_int64(0 if seen is None else seen.stride(0)),
        ctypes.c_float(scaling),
        ctypes.c_int(torch.get_num_threads()),
        ctypes.c_int(keys.dtype == torch.bfloat16),
    )
    assert not failed
    return mixed.to(query.dtype), lse


@torch.library.register_fake("kvgauge::decode_attention", lib=OPERATORS)
def _shapes(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, heads, group, _ = query.shape
    return query.new_empty(batch, heads, group, values.shape[3]), query.new_empty(
        batch, heads, group, dtype=torch.float32
    )


def _strides(rows: Tensor) -> ctypes.Array[ctypes.c_int64]:
    """Of sequences, heads and dimensions."""
    return (ctypes.c_int64 * 3)(rows.stride(0), rows.stride(1), rows.stride(3))
