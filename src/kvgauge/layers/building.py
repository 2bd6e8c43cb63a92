"""The cache of a whole model: a method's layers where the cache grows with the context, transformers' own elsewhere."""

from __future__ import annotations

from typing import Any, TypeVar

from transformers import PreTrainedModel
from transformers.cache_utils import LinearAttentionLayer

from kvgauge.architecture.facts import attention_device, model_facts
from kvgauge.architecture.head_frame import HeadFrame
from kvgauge.architecture.kinds import own_cache
from kvgauge.architecture.rotations import layer_rotation
from kvgauge.errors import UserError
from kvgauge.layers.cache import KVCache, Placement
from kvgauge.layers.exact import ExactLayer
from kvgauge.layers.mla import ExactLatentLayer

AnyCache = TypeVar("AnyCache", bound=KVCache)


def placed(cache: AnyCache, model: PreTrainedModel, *, turning: bool = False) -> AnyCache:
    """Give `cache` its place in `model`.

    Args:
        cache: an empty one, with a layer for each layer of the model that may be compressed.
        model: any decoder.
        turning: the cache's layers turn keys to other positions. They then get keys and queries in the `HeadFrame` of
            their layer, where every rotation is one of halves; `KVCache.dense` gives the model's own.

    Returns:
        The same cache, which now holds all layers of the model.

    Raises:
        UserError: nothing in the model may be compressed, there are more or fewer layers than that, or what a layer
            does to its keys is not known and `turning` needs it.
    """
    facts = model_facts(model)
    if len(cache.own) != facts.num_layers:
        raise UserError(
            f"{len(cache.own)} cache layers for the {facts.num_layers} layers of {facts.name} that may be compressed"
        )
    frames: list[HeadFrame | None] = [None] * facts.num_layers
    if turning and facts.latent is None:
        found = [
            layer_rotation(model, layer).frame.to(attention_device(model, layer)) for layer in range(facts.num_layers)
        ]
        frames = [None if frame.identity else frame for frame in found]
    plain = len(facts.layers) == facts.num_layers and all(frame is None for frame in frames)
    if plain and not any(layer.readers or layer.state_nbytes for layer in facts.layers):
        return cache  # no layer is left to transformers
    cache.place(
        Placement(
            own=facts.compressed,
            frames=tuple(frames),
            readers=tuple(frozenset(facts.layers[index].readers) for index in facts.compressed),
            others=lambda: _others(model),
        )
    )
    return cache


def exact_cache(model: PreTrainedModel) -> KVCache:
    """The uncompressed cache of any decoder."""
    facts = model_facts(model)
    kind = ExactLayer if facts.latent is None else ExactLatentLayer
    return placed(KVCache([kind() for _ in range(facts.num_layers)]), model)


def _others(model: PreTrainedModel) -> list[Any]:
    """transformers' own empty layers; where a layer of ours stands, the state beside it, or None."""
    facts = model_facts(model)
    layers: list[Any] = list(own_cache(model.config).layers)
    for index in facts.compressed:
        beside = facts.layers[index].state_nbytes > 0
        layers[index] = LinearAttentionLayer(layers[index].number_of_states) if beside else None
    return layers
