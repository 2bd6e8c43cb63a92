"""A cache that keeps nothing and shows what attention sees: queries, keys and values of every layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from kvgauge.architecture.facts import model_facts
from kvgauge.attend.attention import exact_attention
from kvgauge.attend.mask import Mask
from kvgauge.errors import UserError
from kvgauge.layers.building import placed
from kvgauge.layers.cache import KVCache, LayerCache
from kvgauge.layers.mla import TakesLatents
from kvgauge.store.rows import RowBuffer


@dataclass(frozen=True)
class Observation:
    """What one attention layer sees in one forward pass.

    Attributes:
        layer: index among the layers that may be compressed.
        queries: (batch, num_attention_heads, tokens, head_dim), post-RoPE.
        keys, values: (batch, num_key_value_heads, tokens, head_dim), keys post-RoPE.
        positions: (batch or 1, tokens), or None where the model does not pass them on.
        scaling: what the model does to the scores before the softmax.
    """

    layer: int
    queries: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor | None
    scaling: float


class ObservingLayer(LayerCache):
    """Hands a forward pass of one layer to `observe` and forgets it."""

    def __init__(self, observe: Callable[[Observation], None]) -> None:
        super().__init__()
        self.observe = observe
        self._seen: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple:
        self._seen = (key_states, value_states)
        return self, self

    def attend(self, query: Tensor, *, mask: Mask, scaling: float, position_ids: Tensor | None) -> Tensor:
        """See `kvgauge.attend.attention.Attendable`."""
        assert self._seen is not None
        keys, values = self._seen
        self._forget()
        self.observe(Observation(self.index, query, keys, values, position_ids, scaling))
        return exact_attention(query, keys, values, mask, scaling)

    def attend_again(self, query: Tensor, mask: Mask, scaling: float) -> Tensor:
        """See `LayerCache.attend_again`; what is observed is the layer's own attention alone."""
        assert self._seen is not None
        return exact_attention(query, *self._seen, mask, scaling)

    def _forget(self) -> None:
        """Keep nothing of the pass, unless other attention layers have yet to read it."""
        placement = None if self.cache is None else self.cache.placement
        if placement is None or not placement.readers[self.index]:
            self._seen = None

    def compress(self) -> None:
        """There is nothing to compress."""

    def nbytes_by_part(self) -> dict[str, int]:
        return {}

    def dense(self) -> tuple[Tensor, Tensor]:
        raise UserError("a cache that only observes holds no keys and values")

    def attend_entries(self, query: Tensor, scaling: float) -> Tensor:
        raise UserError("a cache that only observes holds nothing to attend to")

    def buffers(self) -> Sequence[RowBuffer]:
        return ()


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
        self.observe(Observation(self.index, absorbed, latents, latents, position_ids, scaling))
        return exact_attention(query, *self.projections.expand(latents, rotary), mask, scaling)


def observing_cache(model: PreTrainedModel, observe: Callable[[Observation], None]) -> KVCache:
    """A cache for one forward pass that shows it to `observe`, layer by layer; it keeps nothing that may be compressed.

    Args:
        model: any decoder.
        observe: called once for every layer that may be compressed, which `Observation.layer` counts.
    """
    facts = model_facts(model)
    kind = ObservingLayer if facts.latent is None else ObservingLatentLayer
    return placed(KVCache([kind(observe) for _ in range(facts.num_layers)]), model)
