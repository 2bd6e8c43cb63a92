"""Caches filled without a model: random keys and values, for timings of steps whose prefill would take too long."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvgauge.architecture.facts import ModelFacts, model_facts
from kvgauge.layers.cache import KVCache


def random_states(
    facts: ModelFacts, batch: int, tokens: int, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What a layer caches of `tokens` tokens, drawn at random.

    Returns:
        Keys and values (batch, num_key_value_heads, tokens, head_dim), one tensor for both: what they are costs
        nothing. With MLA latents and rotary keys, (batch, 1, tokens, dimension).
    """

    def drawn(heads: int, dimension: int) -> Tensor:
        return torch.randn(batch, heads, tokens, dimension, generator=generator).to(device, facts.dtype)

    keys = drawn(facts.num_key_value_heads, facts.head_dim)
    return keys, keys if facts.latent is None else drawn(1, facts.latent.qk_rope_head_dim)


def random_query(facts: ModelFacts, batch: int, device: torch.device) -> tuple[Tensor, float]:
    """A query (batch, num_attention_heads, 1, dimension) drawn at random, and the factor on its scores."""
    latent = facts.latent
    dimension = facts.head_dim if latent is None else latent.qk_nope_head_dim + latent.qk_rope_head_dim
    query = torch.randn(batch, facts.num_attention_heads, 1, dimension, dtype=facts.dtype, device=device)
    return query, dimension**-0.5


def fill(model: PreTrainedModel, cache: Cache, keys: Tensor, values: Tensor) -> None:
    """Put `keys` and `values` into every layer of an empty cache, as a prefill would; shapes as `random_states`.

    A cache that merges or evicts while it is filled gets as many entries as it keeps of so many tokens.

    Raises:
        UserError: the cache needs more of a prefill than keys and values.
    """
    if isinstance(cache, KVCache):
        cache.fill(keys, values)
        return
    for index in range(model_facts(model).num_layers):
        cache.update(keys, values, index)
