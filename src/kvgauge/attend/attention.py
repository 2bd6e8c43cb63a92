"""The one seam with transformers: an attention function that lets a cache attend by itself.

Attention modules call ``past_key_values.update(key, value, layer_idx)`` and hand what comes back, untouched, to the
attention function registered under a name. A cache layer of ours returns an `Attendable` in the place of the keys;
`attention_forward` then asks it for the output. Tensors fall through to scaled dot product attention, so a model with
this function set behaves as before with every other cache.

Modules pass on more than queries and keys: capped scores and sink logits are computed (`Scaling`), windows and chunks
come in the mask, and what is neither computed here nor known to change nothing is refused by its name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Set
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import TransformersKwargs

from kvgauge.architecture.scaling import Scaling
from kvgauge.attend import blocks
from kvgauge.attend.mask import CAUSAL, Mask, causal_mask
from kvgauge.attend.spelling import spelt_out
from kvgauge.errors import UserError
from kvgauge.kernels.cpu.decode_attention import decode_attention
from kvgauge.kernels.cpu.library import available
from kvgauge.kernels.cpu.stored_attention import StoredRun, stored_attention
from kvgauge.kernels.cpu.stored_rows import plain_rows

NAME = "kvgauge"

FLASH_DIM = 256
"""The largest head that flash attention takes; keys and values then have one size, and 16 bits."""

NEUTRAL = frozenset(TransformersKwargs.__annotations__) | {"softcap", "s_aux", "sliding_window", "use_cache"}
"""What modules hand on that is computed here, comes in the mask, or is for others."""


@runtime_checkable
class Attendable(Protocol):
    """Cached tokens that know how to be attended to."""

    def attend(self, query: Tensor, *, mask: Mask, scaling: float, position_ids: Tensor | None) -> Tensor:
        """The attention output.

        Args:
            query: (batch, num_attention_heads, queries, head_dim), post-RoPE.
            mask: which of the tokens (logical length) each query sees.
            scaling: factor on the scores, 1/√head_dim as a rule; a `Scaling` where there is more to them.
            position_ids: (batch, queries) or (1, queries), or None where the model does not pass them on.

        Returns:
            (batch, queries, num_attention_heads, head_dim).
        """
        ...


class ServesModules(ABC):
    """An `Attendable` that several attention modules ask."""

    @abstractmethod
    def for_module(self, module: nn.Module) -> Attendable:
        """What attends for one of them."""


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


class StoredTokens(ABC):
    """A `Segment` in a form that the compiled kernel for stored rows may know."""

    @abstractmethod
    def stored_run(self) -> StoredRun | None:
        """The segment as the kernel reads it, until something is written to it; None where it cannot."""


class ExactSegment(StoredTokens):
    """Exact keys and values (batch, num_key_value_heads, tokens, head_dim) as a segment of attention."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.num_key_value_heads = keys.shape[1]

    def __len__(self) -> int:
        return self.keys.shape[2]

    def scores(self, query: Tensor) -> Tensor:
        """See `Segment`."""
        return query @ self.keys.transpose(-1, -2)

    def mix(self, weights: Tensor) -> Tensor:
        """See `Segment`."""
        return weights @ self.values

    def stored_run(self) -> StoredRun | None:
        """See `StoredTokens`."""
        keys, values = plain_rows(self.keys), plain_rows(self.values)
        return None if keys is None or values is None else StoredRun([keys], [values])


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
    """The function that transformers calls in every attention module (see the module docstring).

    Raises:
        UserError: the module asks for something that is not computed.
    """
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    plain = softcap is None and sinks is None
    full = factor if plain else Scaling(factor, softcap, sinks)
    tensors = isinstance(key, Tensor)
    _check(module, kwargs, NEUTRAL | {"position_bias"} if tensors and plain else NEUTRAL)
    if isinstance(key, Tensor) and plain:
        chunk = attention_mask is None and 1 < query.shape[2] < key.shape[2]
        if chunk and getattr(module, "is_causal", True):  # torch would align it at the first token
            if not dropout and kwargs.get("position_bias") is None:
                return exact_attention(query, key, value, CAUSAL, factor).contiguous(), None
            attention_mask = causal_mask(query.shape[2], key.shape[2], query.device)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise UserError(f"{type(module).__name__} drops attention weights: call model.eval() first")
    if isinstance(key, Tensor):
        return exact_attention(query, key, value, Mask.of(attention_mask), full).contiguous(), None
    attending = key.for_module(module) if isinstance(key, ServesModules) else key
    mask, positions = Mask.of(attention_mask), kwargs.get("position_ids")
    return attending.attend(query, mask=mask, scaling=full, position_ids=positions).contiguous(), None


def _check(module: nn.Module, kwargs: dict[str, Any], known: Set[str]) -> None:
    asked = [name for name, value in kwargs.items() if value is not None and name not in known]
    if kwargs.get("is_causal") is False:
        asked.append("is_causal=False")
    if asked:
        raise UserError(
            f"{type(module).__name__} asks attention for {', '.join(asked)}, which caches of kvgauge do not compute: "
            f"this model cannot be measured"
        )


def install(model: PreTrainedModel) -> None:
    """Make `model` attend through `attention_forward`; its results with ordinary caches do not change."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, spelt_out)
    model.set_attn_implementation(NAME)


def exact_attention(query: Tensor, keys: Tensor, values: Tensor, mask: Mask, scaling: float) -> Tensor:
    """Attention to exact keys and values (batch, num_key_value_heads, tokens, head_dim): (batch, queries, H, head_dim).

    A plain causal mask is aligned at the last token.
    """
    queries, tokens, gqa = query.shape[2], keys.shape[2], query.shape[1] != keys.shape[1]
    if queries == 1 and not mask.by_head:
        return _one_query(query, keys, values, mask, scaling)
    if not Scaling.of(scaling).plain:
        return segmented_attention(query, [ExactSegment(keys, values)], mask, scaling)
    bias = mask.bias(query, tokens)
    if bias is None and queries < tokens:
        return _chunk(query, keys, values, scaling)
    if bias is not None and gqa and query.device.type != "cpu":
        keys, values = (_for_every_query_head(states, query.shape[1]) for states in (keys, values))
    output = scaled_dot_product_attention(
        query, keys, values, attn_mask=bias, scale=scaling, is_causal=bias is None, enable_gqa=gqa
    )
    return output.transpose(1, 2)


def _chunk(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Plainly causal queries of the last tokens, more than one and fewer than tokens, without a mask of all of them."""
    queries, tokens, heads = query.shape[2], keys.shape[2], query.shape[1]
    if query.device.type == "cpu":
        outputs, block = [], blocks.queries_at_once(4 * tokens, blocks.MASK_BYTES)
        for start in range(0, queries, block):
            part = query[:, :, start : start + block]
            seen = tokens - queries + start + part.shape[2]
            bias = causal_mask(part.shape[2], seen, query.device)
            own_keys, own_values = keys[:, :, :seen], values[:, :, :seen]
            output = scaled_dot_product_attention(
                part, own_keys, own_values, attn_mask=bias, scale=scaling, enable_gqa=heads != keys.shape[1]
            )
            outputs.append(output.transpose(1, 2))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    flash = query.dtype.itemsize == 2 and keys.shape[-1] == values.shape[-1] <= FLASH_DIM
    if not flash:
        keys, values = (_for_every_query_head(states, heads) for states in (keys, values))
    bias = causal_lower_right(queries, tokens)
    gqa = heads != keys.shape[1]
    output = scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=scaling, enable_gqa=gqa)
    return output.transpose(1, 2)


def _for_every_query_head(states: Tensor, heads: int) -> Tensor:
    """Keys or values with each head as often as query heads share it: the efficient kernel of CUDA knows no groups."""
    repeats = heads // states.shape[1]
    if repeats == 1:
        return states
    return states[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2)


def _one_query(query: Tensor, keys: Tensor, values: Tensor, mask: Mask, scaling: float) -> Tensor:
    """`exact_attention` of one query per head, with one mask for all heads: a group reads its keys once."""
    batch, heads, _, head_dim = query.shape
    kv_heads, tokens = keys.shape[1:3]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    fused = None
    if mask.hides_only:
        fused = decode_attention(grouped, keys, values, scaling, mask.row(batch, tokens))
    full = Scaling.of(scaling)
    if fused is not None:
        output, left = fused[0], full.share(fused[1])
        output = output if left is None else output * left[..., None].to(output.dtype)
        return output.reshape(batch, 1, heads, values.shape[-1])
    if not full.plain:
        return segmented_attention(query, [ExactSegment(keys, values)], mask, scaling)
    bias = mask.bias(query, tokens)
    output = scaled_dot_product_attention(grouped, keys, values, attn_mask=bias, scale=scaling)
    return output.reshape(batch, 1, heads, values.shape[-1])


def segmented_attention(query: Tensor, segments: list[Segment], mask: Mask, scaling: float) -> Tensor:
    """One softmax over several runs of tokens that are stored in different forms.

    Args:
        query: (batch, num_attention_heads, queries, head_dim).
        segments: in logical order; their entries together are those of the mask.
        mask: the same for all heads.
        scaling: factor on the scores, or `Scaling`.

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
        mask = mask.spread(queries)
    block = blocks.queries_at_once(batch * heads * total * 4, blocks.score_block_bytes(query.device))
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
    if not mask.hides_only:
        return None
    batch, heads, _, head_dim = query.shape
    kv_heads = segments[0].num_key_value_heads
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    together = _attend_stored(grouped, segments, sum(entries), mask, scaling)
    if together is not None:
        left = Scaling.of(scaling).share(together[1])
        output = together[0] if left is None else together[0] * left[..., None].to(query.dtype)
        return output.reshape(batch, 1, heads, -1)
    if not any(isinstance(segment, OnePassSegment) for segment in segments):
        return None
    parts = []
    for segment, own in zip(segments, mask.split(entries), strict=True):
        if isinstance(segment, OnePassSegment):
            part = segment.attend_once(grouped, scaling, own)
            if part is None:
                return None
        else:
            part = _attend_alone(segment, grouped, scaling, own)
        parts.append(part)
    output, total = parts[0]
    if len(parts) > 1:
        normalisers = torch.stack([lse for _, lse in parts])
        total = normalisers.logsumexp(dim=0)
        shares = torch.softmax(normalisers, dim=0).to(query.dtype)
        output = sum(part * share[..., None] for (part, _), share in zip(parts, shares, strict=True))
    left = Scaling.of(scaling).share(total)
    output = output if left is None else output * left[..., None].to(output.dtype)
    return output.reshape(batch, 1, heads, -1)


def _attend_stored(
    query: Tensor, segments: list[Segment], total: int, mask: Mask, scaling: float
) -> tuple[Tensor, Tensor] | None:
    """All segments at once, where the kernel knows the forms of all."""
    if torch.compiler.is_compiling() or not available():
        return None
    runs = []
    for segment in segments:
        run = segment.stored_run() if isinstance(segment, StoredTokens) else None
        if run is None:
            return None
        runs.append(run)
    return stored_attention(query, runs, runs[0].output_dim, scaling, mask.row(query.shape[0], total))


def _attend_alone(segment: Segment, query: Tensor, scaling: float, mask: Mask) -> tuple[Tensor, Tensor]:
    """The output and the log-normalisers of one segment that has no pass of its own."""
    scores = Scaling.of(scaling).capped(segment.scores(query * scaling))
    scores = scores if scores.dtype.itemsize >= 4 else scores.float()
    mask.block(0, 1, len(segment)).apply_(scores)
    return segment.mix(torch.softmax(scores, dim=-1).to(query.dtype)), scores.logsumexp(dim=-1)


def _attend_block(query: Tensor, segments: list[Segment], entries: list[int], mask: Mask, scaling: float) -> Tensor:
    batch, heads, queries, head_dim = query.shape
    kv_heads = segments[0].num_key_value_heads
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * queries, head_dim) * scaling
    parts = [segment.scores(grouped) for segment in segments]
    scores = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    full = Scaling.of(scaling)
    scores = full.capped(scores)
    mask.apply_(scores.view(batch, heads, queries, -1))
    exact = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores, dim=-1, dtype=exact)
    left = None if full.sinks is None else full.share(scores.to(exact).logsumexp(dim=-1))
    weights = (weights if left is None else weights * left[..., None]).to(query.dtype)
    mixed = [segment.mix(share) for segment, share in zip(segments, weights.split(entries, dim=-1), strict=True)]
    output = sum(mixed[1:], start=mixed[0])
    return output.view(batch, heads, queries, -1).transpose(1, 2)
