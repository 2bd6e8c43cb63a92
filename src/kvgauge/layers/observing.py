"""A cache that keeps nothing and shows what attention sees: queries, keys and values of every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from kvgauge.attend.attention import exact_attention
from kvgauge.attend.mask import Mask
from kvgauge.layers.mla import TakesLatents


@dataclass(frozen=True)
class Observation:
    """What one attention layer sees in one forward pass.

    Attributes:
        layer: index.
        queries: (batch, num_attention_heads, tokens, head_dim), post-RoPE.
        keys, values: (batch, num_key_value_heads, tokens, head_dim), keys post-RoPE.
        positions: (batch or 1, tokens), or None where the model does not pass them on.
    """

    layer: int
    queries: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor | None


class ObservingLayer(CacheLayerMixin):
    """Hands every forward pass of one layer to `observe` and forgets it."""

    def __init__(self, layer: int, observe: Callable[[Observation], None]) -> None:
        super().__init__()
        self.layer, self.observe = layer, observe
        self._seen: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple:
        self._seen = (key_states, value_states)
        return self, self

    def attend(self, query: Tensor, *, mask: Mask, scaling: float, position_ids: Tensor | None) -> Tensor:
        """See `kvgauge.attend.attention.Attendable`."""
        assert self._seen is not None
        keys, values = self._seen
        self._seen = None
        self.observe(Observation(self.layer, query, keys, values, position_ids))
        return exact_attention(query, keys, values, mask, scaling)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class ObservingLatentLayer(TakesLatents, ObservingLayer):
    """The same for a layer of an MLA model: latents are shown as keys and as values, queries as they meet them.

    What is shown is (batch, num_attention_heads, tokens, kv_lora_rank) for the queries, without their rotary part, and
    (batch, 1, tokens, kv_lora_rank) for the latents.
    """

    def attend(self, query: Tensor, *, mask: Mask, scaling: float, position_ids: Tensor | None) -> Tensor:
        """See `kvgauge.attend.attention.Attendable`."""
        assert self._seen is not None
        assert self.projections is not None
        latents, rotary = self._seen
        self._seen = None
        absorbed = self.projections.absorb(query)[..., : latents.shape[-1]]
        self.observe(Observation(self.layer, absorbed, latents, latents, position_ids))
        return exact_attention(query, *self.projections.expand(latents, rotary), mask, scaling)


def observing_cache(num_layers: int, observe: Callable[[Observation], None], *, latents: bool = False) -> Cache:
    """A cache for one forward pass after another, each a sequence of its own, that shows all of them to `observe`.

    Args:
        num_layers: of the model.
        observe: called once per layer and pass.
        latents: the model has multi-head latent attention.
    """
    kind = ObservingLatentLayer if latents else ObservingLayer
    return Cache(layers=[kind(layer, observe) for layer in range(num_layers)])
