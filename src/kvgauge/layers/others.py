"""Layers that are left to transformers: windows and chunks, states of linear attention, layers that hold nothing.

They hold no more than a window or a state whatever the length of the context, so there is nothing in them to compress.
Their bytes count all the same, and what is done to a cache (batches, beams, cropping, another prompt) is done to them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

from kvgauge.errors import UserError


def nbytes(layer: Any) -> int:
    """Bytes of its keys, values and states, of all sequences."""
    return sum(tensor.nbytes for tensor in tensors(layer))


def tensors(layer: Any) -> Iterator[Tensor]:
    """Everything that it holds."""
    held = [getattr(layer, name, None) for name in ("keys", "values", "indexer_keys")]
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        held += [*layer.conv_states.values(), *layer.recurrent_states.values()]
    yield from (tensor for tensor in held if tensor is not None)


def trim(layer: Any) -> None:
    """Give back what a window keeps alive of a long pass: its rows are a view of all that the pass attended to."""
    if isinstance(layer, DynamicSlidingWindowLayer) and layer.keys is not None:
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()


def copied(layer: Any) -> Any:
    """A layer that goes on from the same tokens by itself."""
    other = copy.copy(layer)
    if isinstance(layer, LinearAttentionCacheLayerMixin):  # states are written in place; keys and values are not
        for name, value in vars(layer).items():
            if isinstance(value, dict):
                setattr(other, name, {key: _cloned(item) for key, item in value.items()})
    return other


def recordable(layer: Any) -> bool:
    """Autograd can record passes that read it: nothing is written in place."""
    return not isinstance(layer, LinearAttentionCacheLayerMixin)


def detach(layer: Any) -> None:
    """Leave the graph of a recorded pass: what comes next does not reach back into it."""
    if getattr(layer, "keys", None) is not None:
        layer.keys, layer.values = layer.keys.detach(), layer.values.detach()


def select(layer: Any, rows: Tensor) -> None:
    """Keep the sequences `rows` of the batch, in that order, as often as they are named."""
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        index = layer.device if layer.device is not None else rows.device
        LinearAttentionCacheLayerMixin.reorder_cache(layer, rows.to(index))
    if getattr(layer, "keys", None) is not None:
        layer.keys, layer.values = (part.index_select(0, rows.to(part.device)) for part in (layer.keys, layer.values))


def check_crop(layer: Any) -> None:
    """Refuse to forget tokens where the layer cannot.

    Raises:
        UserError: tokens have left a window, or are in a state.
    """
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        raise UserError("a state of linear attention cannot forget tokens: start a new cache")
    if isinstance(layer, DynamicSlidingWindowLayer) and layer.get_seq_length() >= layer.sliding_window:
        raise UserError(f"a window of {layer.sliding_window} tokens has moved on and cannot go back: start a new cache")


def reversible_tokens(layer: Any) -> int | None:
    """See `kvgauge.layers.cache.LayerCache.reversible_tokens`; None where there is no limit."""
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        return 0
    if isinstance(layer, DynamicSlidingWindowLayer):
        return max(0, int(layer.sliding_window) - 1 - layer.get_seq_length())
    return None


def _cloned(item: Any) -> Any:
    return item.clone() if isinstance(item, torch.Tensor) else item
