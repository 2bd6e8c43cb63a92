"""The one seam with transformers: an attention function that lets a cache attend by itself.

Attention modules call ``past_key_values.update(key, value, layer_idx)`` and hand what comes back, untouched, to the
attention function registered under a name. A cache layer of ours returns an `Attendable` in the place of the keys;
`attention_forward` then asks it for the output. Tensors fall through to scaled dot product attention, so a model with
this function set behaves as before with every other cache.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvgauge.attend.mask import Mask
from kvgauge.kernels.cpu.decode_attention import decode_attention

NAME = "kvgauge"

# Scores of one block of queries may take this many bytes: long prompts attend block by block. A few such blocks live at
# a time, and they stay in a processor's last-level cache.
SCORE_BLOCK_BYTES = 8 * 2**20


@runtime_checkable
class Attendable(Protocol):
    """Cached tokens that know how to be attended to."""

    def attend(self, query: Tensor, *, mask: Mask, scaling: float, position_ids: Tensor | None) -> Tensor:
        """The attention output.

        Args:
            query: (batch, num_attention_heads, queries, head_dim), post-RoPE.
            mask: which of the tokens (logical length) each query sees.
            scaling: factor on the scores, 1/√head_dim as a rule.
            position_ids: (batch, queries) or (1, queries), or None where the model does not pass them on.

        Returns:
            (batch, queries, num_attention_heads, head_dim).
        """
        ...


class Segment(Protocol):
    """A run of cached tokens, in whatever form they are stored."""

    num_key_value_heads: int

    def __len__(self) -> int:
        """Stored entries."""
        ...

    def scores(self, query: Tensor) -> Tensor:
        """Unscaled scores (batch, num_key_value_heads, rows, entries) of grouped queries (…, rows, head_dim)."""
        ...

    def mix(self, weights: Tensor) -> Tensor:
        """Weighted sums of the values (batch, num_key_value_heads, rows, head_dim) for weights (…, rows, entries)."""
        ...


class OnePassSegment(ABC):
    """A `Segment` that one query per head can attend to in a single pass over its entries."""

    @abstractmethod
    def attend_once(self, query: Tensor, scaling: float, mask: Mask) -> tuple[Tensor, Tensor] | None:
        """Its attention output and log-normalisers, as `kvgauge.kernels.cpu.decode_attention`; None where it cannot.

        Args:
            query: (batch, num_key_value_heads, group, head_dim).
            scaling: factor on the scores.
            mask: of its entries, one that hides only.
        """


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Attendable,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in every attention module (see the module docstring)."""
    if isinstance(key, Tensor):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = key.attend(query, mask=Mask.of(attention_mask), scaling=scale, position_ids=kwargs.get("position_ids"))
    return output.contiguous(), None


def install(model: PreTrainedModel) -> None:
    """Make `model` attend through `attention_forward`; its results with ordinary caches do not change."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def exact_attention(query: Tensor, keys: Tensor, values: Tensor, mask: Mask, scaling: float) -> Tensor:
    """Attention to exact keys and values (batch, num_key_value_heads, tokens, head_dim): (batch, queries, H, head_dim).

    A plain causal mask is aligned at the last token.
    """
    queries, tokens, gqa = query.shape[2], keys.shape[2], query.shape[1] != keys.shape[1]
    if queries == 1 and not mask.by_head:
        return _one_query(query, keys, values, mask, scaling)
    bias = mask.bias(query, tokens)
    output = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=bias, scale=scaling, is_causal=bias is None, enable_gqa=gqa
    )
    return output.transpose(1, 2)


def _one_query(query: Tensor, keys: Tensor, values: Tensor, mask: Mask, scaling: float) -> Tensor:
    """`exact_attention` of one query per head, with one mask for all heads: a group reads its keys once."""
    batch, heads, _, head_dim = query.shape
    kv_heads, tokens = keys.shape[1:3]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    fused = None
    if mask.hides_only:
        fused = decode_attention(grouped, keys, values, scaling, mask.row(batch, tokens))
    if fused is not None:
        return fused[0].reshape(batch, 1, heads, values.shape[-1])
    bias = mask.bias(query, tokens)
    output = torch.nn.functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=bias, scale=scaling)
    return output.reshape(batch, 1, heads, values.shape[-1])


def segmented_attention(query: Tensor, segments: list[Segment], mask: Mask, scaling: float) -> Tensor:
    """One softmax over several runs of tokens that are stored in different forms.

    Args:
        query: (batch, num_attention_heads, queries, head_dim).
        segments: in logical order; their entries together are those of the mask.
        mask: the same for all heads.
        scaling: factor on the scores.

    Returns:
        (batch, queries, num_attention_heads, head_dim).
    """
    segments = [segment for segment in segments if len(segment)]
    entries = [len(segment) for segment in segments]
    total = sum(entries)
    batch, heads, queries, _ = query.shape
    if queries == 1:
        output = _attend_one(query, segments, entries, mask, scaling)
        if output is not None:
            return output
    else:
        mask = mask.whole(queries, total, query.device)
    block = max(1, SCORE_BLOCK_BYTES // (batch * heads * total * 4))
    outputs = []
    for start in range(0, queries, block):
        stop = min(start + block, queries)
        part = query[:, :, start:stop]
        outputs.append(_attend_block(part, segments, entries, mask.block(start, stop, total), scaling))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _attend_one(
    query: Tensor, segments: list[Segment], entries: list[int], mask: Mask, scaling: float
) -> Tensor | None:
    """One query per head: every segment attends on its own, and their normalisers join them. None where none can."""
    if not (mask.hides_only and any(isinstance(segment, OnePassSegment) for segment in segments)):
        return None
    batch, heads, _, head_dim = query.shape
    kv_heads = segments[0].num_key_value_heads
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    parts = []
    for segment, own in zip(segments, mask.split(entries), strict=True):
        if isinstance(segment, OnePassSegment):
            part = segment.attend_once(grouped, scaling, own)
            if part is None:
                return None
        else:
            part = _attend_alone(segment, grouped, scaling, own)
        parts.append(part)
    output, _ = parts[0]
    if len(parts) > 1:
        shares = torch.softmax(torch.stack([lse for _, lse in parts]), dim=0).to(query.dtype)
        output = sum(part * share[..., None] for (part, _), share in zip(parts, shares, strict=True))
    return output.reshape(batch, 1, heads, -1)


def _attend_alone(segment: Segment, query: Tensor, scaling: float, mask: Mask) -> tuple[Tensor, Tensor]:
    """The output and the log-normalisers of one segment that has no pass of its own."""
    scores = segment.scores(query * scaling)
    scores = scores if scores.dtype.itemsize >= 4 else scores.float()
    mask.block(0, 1, len(segment)).apply_(scores)
    return segment.mix(torch.softmax(scores, dim=-1).to(query.dtype)), scores.logsumexp(dim=-1)


def _attend_block(query: Tensor, segments: list[Segment], entries: list[int], mask: Mask, scaling: float) -> Tensor:
    batch, heads, queries, head_dim = query.shape
    kv_heads = segments[0].num_key_value_heads
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * queries, head_dim) * scaling
    parts = [segment.scores(grouped) for segment in segments]
    scores = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    mask.apply_(scores.view(batch, heads, queries, -1))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32 if scores.dtype.itemsize < 4 else None).to(query.dtype)
    mixed = [segment.mix(share) for segment, share in zip(segments, weights.split(entries, dim=-1), strict=True)]
    output = sum(mixed[1:], start=mixed[0])
    return output.view(batch, heads, queries, -1).transpose(1, 2)
