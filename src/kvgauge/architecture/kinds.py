"""What transformers' own cache keeps of every layer, which is where a layer's kind shows."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import (
    CacheLayerMixin,
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from kvgauge.errors import UserError


class Kind(str, Enum):
    """What a layer caches, and so what may be compressed."""

    FULL = "full"
    """Keys and values of every token."""
    LATENT = "latent"
    """A latent and a rotary key of every token (MLA)."""
    WINDOW = "window"
    """Keys and values of the last tokens."""
    CHUNK = "chunk"
    """The same; queries see the tokens of their own chunk."""
    LINEAR = "linear"
    """A state of fixed size: linear attention, a state space, a short convolution."""
    SHARED = "shared"
    """Nothing: the layer reads what another one cached."""
    NONE = "none"
    """Nothing: the layer has no attention."""
    SPARSE = "sparse"
    """Keys and values of every token, and keys of an indexer that chooses among them."""
    OTHER = "other"
    """A form of its own."""


@dataclass(frozen=True)
class Keeping:
    """What transformers keeps of a layer.

    Attributes:
        kind: see `Kind`; MLA shows in the module only, here it is `Kind.FULL`.
        window: tokens that a query of a window or chunk layer may see, itself included.
        state: there is a recurrent or convolutional state as well.
    """

    kind: Kind
    window: int | None = None
    state: bool = False


def own_cache(config: PretrainedConfig) -> DynamicCache:
    """The cache that transformers itself makes for a model of `config`.

    Raises:
        UserError: it makes none.
    """
    try:
        return DynamicCache(config=config)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"transformers makes no cache for {config.model_type} ({type(error).__name__}: {error}): not supported"
        ) from error


def keepings(config: PretrainedConfig) -> list[Keeping]:
    """What transformers keeps of every layer of a model of `config`."""
    text = config.get_text_config(decoder=True)
    types = getattr(text, "layer_types", None)
    shared = getattr(text, "kv_sharing_modes", None)
    found = []
    for index, layer in enumerate(own_cache(config).layers):
        reused = shared is not None and shared[index] == "reuse"
        chunked = "chunk" in types[index] if types else getattr(text, "attention_chunk_size", None) is not None
        found.append(_keeping(layer, reused, chunked))
    return found


def _keeping(layer: object, reused: bool, chunked: bool) -> Keeping:
    state = isinstance(layer, LinearAttentionCacheLayerMixin)
    if isinstance(layer, DummyLayer):
        return Keeping(Kind.SHARED if reused else Kind.NONE)
    if isinstance(layer, DynamicSlidingWindowLayer):
        return Keeping(Kind.CHUNK if chunked else Kind.WINDOW, int(layer.sliding_window), state)
    if isinstance(layer, DynamicIndexedLayer):
        return Keeping(Kind.SPARSE)
    if state:
        return Keeping(Kind.FULL if isinstance(layer, DynamicLayer) else Kind.LINEAR, state=True)
    if type(layer) is DynamicLayer:
        return Keeping(Kind.FULL)
    return Keeping(Kind.OTHER if isinstance(layer, CacheLayerMixin) else Kind.NONE)
