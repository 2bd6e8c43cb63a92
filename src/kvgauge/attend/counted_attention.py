"""Attention to entries that stand for several tokens, with the attention that every entry received.

An entry of cardinality c holds one key and the mean value ū of its tokens. Cardinality-normalised attention,
``o = Σ c e^s ū / Σ c e^s``, is a softmax of ``s + ln c``: with equal keys it is exactly what the separate tokens would
have given (AsymKV, arXiv 2506.05410).

The merge that follows needs the column sums of the attention matrix. They are added up block by block of queries while
the output is computed: no matrix of all queries is ever held, and no second forward pass is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvgauge.architecture.scaling import Scaling
from kvgauge.attend.attention import exact_attention
from kvgauge.attend.blocks import score_block_bytes
from kvgauge.attend.cardinalities import HIDDEN, log_cardinalities
from kvgauge.attend.mask import Mask
from kvgauge.kernels.cpu.counting_softmax import counting_softmax
from kvgauge.kernels.cpu.decode_attention import counted_decode_attention

# Scores of one block of queries. BLAS rearranges the keys for every block, which many small ones would pay for.
BLOCK_BYTES = 16 * 2**20


def cardinality_attention(
    query: Tensor, keys: Tensor, values: Tensor, cardinalities: Tensor | None, scaling: float
) -> Tensor:
    """The output alone.

    Args:
        query: (batch, num_attention_heads, queries, head_dim); the last query belongs to the last entry, and the
            last `queries` entries are the queries' own tokens.
        keys, values: (batch, num_key_value_heads, entries, head_dim); values are means.
        cardinalities: (batch, entries), or None where all are 1.
        scaling: factor on the scores, or `Scaling`.

    Returns:
        (batch, queries, num_attention_heads, head_dim).
    """
    queries = query.shape[2]
    if queries > 1:
        keys, values = keys.contiguous(), values.contiguous()  # scaled dot product attention is slow on others
    return exact_attention(query, keys, values, Mask.of_entries(cardinalities, queries, query.dtype), scaling)


def counted_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cardinalities: Tensor | None,
    scaling: float,
    valid: Tensor | None = None,
    block_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The output and the attention that each entry received.

    Args:
        query, keys, values, cardinalities, scaling: as in `cardinality_attention`.
        valid: (batch, queries), False where a query is padding, which attends but does not count.
        block_bytes: bytes of the scores of one block of queries; None takes what suits the device.

    Returns:
        The output (batch, queries, num_attention_heads, head_dim), and the column sums of the softmax over the
        queries and over the query heads of a group, (batch, num_key_value_heads, entries), float32 at least.
    """
    batch, heads, queries, head_dim = query.shape
    kv_heads, entries = keys.shape[1:3]
    groups, past = heads // kv_heads, entries - queries
    full = Scaling.of(scaling)
    if queries == 1 and valid is None:
        grouped = query.reshape(batch, kv_heads, groups, head_dim)
        counted = counted_decode_attention(grouped, keys, values, scaling, cardinalities)
        if counted is not None:
            return counted[0].reshape(batch, 1, heads, values.shape[-1]), counted[1]
    exact = torch.promote_types(query.dtype, torch.float32)
    bias = None if cardinalities is None else log_cardinalities(cardinalities, exact)
    counts = None if valid is None else valid.to(exact)
    sums = keys.new_zeros(batch, kv_heads, entries, dtype=exact)
    if block_bytes is None:
        block_bytes = BLOCK_BYTES if query.device.type == "cpu" else score_block_bytes(query.device)
    block = max(1, min(queries, block_bytes // (batch * heads * entries * query.dtype.itemsize)))
    keys_of_dims = keys.transpose(-1, -2).contiguous()  # products in bfloat16 rearrange them faster
    outputs = []
    for first in range(0, queries, block):
        last = min(queries, first + block)
        seen, rows = past + last, last - first
        part = query[:, :, first:last].reshape(batch, kv_heads, groups * rows, head_dim) * scaling
        weights = _weights(
            full.capped(part @ keys_of_dims[..., :seen]),
            full,
            sums[..., :seen],
            None if bias is None else bias[:, :seen],
            None if counts is None else counts[:, first:last],
            rows,
        )
        mixed = weights.to(values.dtype) @ values[:, :, :seen]
        outputs.append(mixed.view(batch, heads, rows, -1).transpose(1, 2))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), sums


def _weights(
    scores: Tensor, scaling: Scaling, sums: Tensor, bias: Tensor | None, counts: Tensor | None, queries: int
) -> Tensor:
    """The softmax of a block, whose column sums are added to `sums`; other arguments as in `counting_softmax`."""
    if scaling.sinks is None and counting_softmax(scores, sums, bias, counts, queries):
        return scores
    batch, kv_heads, rows, seen = scores.shape
    scores = scores.to(sums.dtype).view(batch, kv_heads, rows // queries, queries, seen)
    if bias is not None:
        scores.add_(bias[:, None, None, None])
    if queries > 1:
        later = torch.ones(queries, queries, dtype=torch.bool, device=scores.device).triu(1)
        scores[..., seen - queries :].masked_fill_(later, HIDDEN)
    weights = torch.softmax(scores, dim=-1).view(batch, kv_heads, rows, seen)
    left = scaling.share(scores.logsumexp(dim=-1).flatten(2)) if scaling.sinks is not None else None
    weights = weights if left is None else weights * left[..., None]
    each = weights.new_ones(1, 1, 1, rows) if counts is None else counts.repeat(1, rows // queries)[:, None, None]
    sums += (each @ weights.detach()).squeeze(2)
    return weights
