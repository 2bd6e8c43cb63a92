"""Caches filled without a model: random keys and values, for timings of steps whose prefill would take too long."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvgauge.architecture.facts import model_facts
from kvgauge.layers.cache import KVCache
from kvgauge.methods.merging.merged import MergedLayer, MergingCache


def fill(model: PreTrainedModel, cache: Cache, states: Tensor) -> None:
    """Put `states` (batch, num_key_value_heads, tokens, head_dim) into every layer, as keys and as values.

    A cache that merges or evicts while it is filled gets as many entries as it keeps of so many tokens, each of them
    standing for as many tokens as the others.
    """
    tokens = states.shape[2]
    if isinstance(cache, MergingCache):
        for layer in cache.layers:
            _fill_merged(layer, states)
    else:
        for index in range(model_facts(model).num_layers):
            cache.update(states, states, index)
    if isinstance(cache, KVCache):
        cache.positions = torch.arange(tokens, device=states.device)[None]


def _fill_merged(layer: MergedLayer, states: Tensor) -> None:
    tokens = states.shape[2]
    entries = min(tokens, layer.policy.entries(tokens))
    sizes = torch.full((entries,), tokens // entries, dtype=torch.int32, device=states.device)
    sizes[: tokens % entries] += 1
    if layer.policy.rule == "evict":
        sizes.fill_(1)
    elif layer.policy.clip is not None:
        sizes.clamp_(max=layer.policy.clip)
    layer.take(states[:, :, :entries], states[:, :, :entries], sizes.expand(states.shape[0], -1), tokens)
