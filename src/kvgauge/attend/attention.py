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

from kvgauge.attend.cardinalities import log_cardinalities
from kvgauge.kernels.cpu.decode_attention import decode_attention

NAME = "kvgauge"

# Scores of one block of queries may take this many bytes: long prompts attend block by block. A few such blocks live at
# a time, and they stay in a processor's last-level cache.
SCORE_BLOCK_BYTES = 8 * 2**20


@runtime_checkable
class Attendable(Protocol):
    """Cached tokens that know how to be attended to."""

    def attend(
        self, query: Tensor, *, attention_mask: Tensor | None, scaling: float, position_ids: Tensor | None
    ) -> Tensor:
        """The attention output.

        Args:
            query: (batch, num_attention_heads, queries, head_dim), post-RoPE.
            attention_mask: None (plain causal), or True where a query sees a token:
                (batch, 1, queries, logical length).
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
    def attend_once(self, query: Tensor, scaling: float, mask: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Its attention output and log-normalisers, as `kvgauge.kernels.cpu.decode_attention`; None where it cannot.

        Args:
            query: (batch, num_key_value_heads, group, head_dim).
            scaling: factor on the scores.
            mask: (batch, entries), False hides an entry; or int32, how many tokens it stands for, 0 for none; None
                hides none.
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
    output = key.attend(query, attention_mask=attention_mask, scaling=scale, position_ids=kwargs.get("position_ids"))
    return output.contiguous(), None


def install(model: PreTrainedModel) -> None:
    """Make `model` attend through `attention_forward`; its results with ordinary caches do not change."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def exact_attention(
    query: Tensor, keys: Tensor, values: Tensor, attention_mask: Tensor | None, scaling: float
) -> Tensor:
    """Attention to exact keys and values (batch, num_key_value_heads, tokens, head_dim): (batch, queries, H, head_dim).

    A None mask is plain causal, aligned at the last token. Integers in the mask of one query say how many tokens each
    entry stands for, 0 for none.
    """
    queries, tokens, gqa = query.shape[2], keys.shape[2], query.shape[1] != keys.shape[1]
    if queries == 1 and (attention_mask is None or attention_mask.shape[1] == 1):
        return _one_query(query, keys, values, attention_mask, scaling)
    mask = attention_mask
    causal = mask is None and queries == tokens
    if mask is None and not causal:
        mask = causal_mask(queries, tokens, query.device)
    output = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, scale=scaling, is_causal=causal, enable_gqa=gqa
    )
    return output.transpose(1, 2)


def _one_query(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """`exact_attention` of one query per head, with one mask for all heads: a group reads its keys once."""
    batch, heads, _, head_dim = query.shape
    kv_heads, tokens = keys.shape[1:3]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    fused = None
    if _hides_only(mask):
        fused = decode_attention(grouped, keys, values, scaling, _seen(mask, batch, tokens))
    if fused is not None:
        return fused[0].reshape(batch, 1, heads, values.shape[-1])
    mask = None if mask is None else _added(mask[..., :tokens], query.dtype)
    output = torch.nn.functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scaling)
    return output.reshape(batch, 1, heads, values.shape[-1])


def causal_mask(queries: int, tokens: int, device: torch.device) -> Tensor:
    """(1, 1, queries, tokens), True where a query sees a token; the last query sees the last token."""
    last = torch.arange(tokens - queries, tokens, device=device)
    return (torch.arange(tokens, device=device)[None, :] <= last[:, None])[None, None]


def hide(mask: Tensor, columns: Tensor) -> Tensor:
    """A mask (…, tokens) with `columns` (…, n) hidden: boolean, counts, or added to the scores."""
    return mask.scatter(-1, columns, torch.finfo(mask.dtype).min if mask.is_floating_point() else 0)


def segmented_attention(
    query: Tensor, segments: list[Segment], attention_mask: Tensor | None, scaling: float
) -> Tensor:
    """One softmax over several runs of tokens that are stored in different forms.

    Args:
        query: (batch, num_attention_heads, queries, head_dim).
        segments: in logical order; their entries together are the logical length.
        attention_mask: as in `Attendable.attend`; or floating point: added to the scores; or for one query integers:
            how many tokens each entry stands for, 0 for none.
        scaling: factor on the scores.

    Returns:
        (batch, queries, num_attention_heads, head_dim).
    """
    segments = [segment for segment in segments if len(segment)]
    entries = [len(segment) for segment in segments]
    total = sum(entries)
    batch, heads, queries, _ = query.shape
    if queries == 1:
        output = _attend_one(query, segments, entries, attention_mask, scaling)
        if output is not None:
            return output
        attention_mask = _added(attention_mask, query.dtype)
    elif attention_mask is None:
        attention_mask = causal_mask(queries, total, query.device)
    block = max(1, SCORE_BLOCK_BYTES // (batch * heads * total * 4))
    outputs = []
    for start in range(0, queries, block):
        part = query[:, :, start : start + block]
        mask = None if attention_mask is None else attention_mask[:, :, start : start + block, :total]
        outputs.append(_attend_block(part, segments, entries, mask, scaling))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _attend_one(
    query: Tensor, segments: list[Segment], entries: list[int], mask: Tensor | None, scaling: float
) -> Tensor | None:
    """One query per head: every segment attends on its own, and their normalisers join them. None where none can."""
    if not (_hides_only(mask) and any(isinstance(segment, OnePassSegment) for segment in segments)):
        return None
    batch, heads, _, head_dim = query.shape
    kv_heads = segments[0].num_key_value_heads
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    seen = _seen(mask, batch, sum(entries))
    masks = [None] * len(entries) if seen is None else seen.split(entries, dim=-1)
    parts = []
    for segment, own in zip(segments, masks, strict=True):
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


def _attend_alone(segment: Segment, query: Tensor, scaling: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output and the log-normalisers of one segment that has no pass of its own."""
    scores = segment.scores(query * scaling)
    scores = scores if scores.dtype.itemsize >= 4 else scores.float()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + log_cardinalities(mask, scores.dtype)[:, None, None]
    return segment.mix(torch.softmax(scores, dim=-1).to(query.dtype)), scores.logsumexp(dim=-1)


def _hides_only(mask: Tensor | None) -> bool:
    """The mask says which tokens are seen, or how often each counts, and adds nothing to their scores."""
    return mask is None or not mask.is_floating_point()


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask, counts in it as what they add to the scores."""
    return mask if mask is None or not _counts(mask) else log_cardinalities(mask, dtype)


def _counts(mask: Tensor) -> bool:
    return mask.dtype != torch.bool and not mask.is_floating_point()


def _seen(mask: Tensor | None, batch: int, tokens: int) -> Tensor | None:
    """The mask (batch or 1, 1, 1, tokens or more) of one query as (batch, tokens)."""
    return None if mask is None else mask[:, 0, 0, :tokens].expand(batch, -1)


def _attend_block(
    query: Tensor, segments: list[Segment], entries: list[int], mask: Tensor | None, scaling: float
) -> Tensor:
    batch, heads, queries, head_dim = query.shape
    kv_heads = segments[0].num_key_value_heads
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * queries, head_dim) * scaling
    parts = [segment.scores(grouped) for segment in segments]
    scores = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    if mask is not None:
        common = mask[:, :, None]  # (batch, 1, 1, queries, tokens): the same for every head and group
        folded = scores.view(batch, kv_heads, heads // kv_heads, queries, -1)
        if mask.dtype == torch.bool:
            folded.masked_fill_(~common, torch.finfo(scores.dtype).min)
        else:
            folded.add_(common)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32 if scores.dtype.itemsize < 4 else None).to(query.dtype)
    mixed = [segment.mix(share) for segment, share in zip(segments, weights.split(entries, dim=-1), strict=True)]
    output = sum(mixed[1:], start=mixed[0])
    return output.view(batch, heads, queries, -1).transpose(1, 2)
