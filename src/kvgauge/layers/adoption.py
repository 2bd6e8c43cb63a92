"""Whose prefill a cache may be made of: the one rule of adoption.

One prefill can serve many caches: what most of them compress are the exact keys and values of the context, and those
are the same whichever cache the model filled.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from kvgauge.errors import UserError

if TYPE_CHECKING:
    from kvgauge.layers.cache import KVCache


class Prefill(Enum):
    """What a cache needs of the prefill that fills it."""

    EXACT = "exact"
    """Its keys and values: those of any cache that has not compressed them will do."""

    WATCHED = "watched"
    """What the attention modules were given, too: the other cache must have kept it, see `LayerInputs`."""

    OWN = "own"
    """A prefill of its own: it compresses while the context is read, or runs passes over the context itself."""


def adopt(cache: KVCache, source: KVCache) -> None:
    """Give an empty cache the exact keys and values of another; they are shared, not copied.

    Raises:
        UserError: the cache needs more of a prefill than the source has, the source is compressed already, or the cache
            is not empty.
    """
    name = type(cache).__name__
    if cache.prefill is Prefill.OWN:
        raise UserError(f"{name} makes its own prefill and adopts no other: let it read the context")
    if cache.prefill is Prefill.WATCHED and source.inputs is None:
        raise UserError(
            f"{name} sees more of the prefill than keys and values: it cannot adopt one that kept no inputs"
        )
    if source.compressed or cache.get_seq_length():
        raise UserError("adopt takes an uncompressed source into an empty cache")
    for index, mine in enumerate(cache.own):
        keys, values = source.dense(index)
        mine.share(cache.framed(index, keys), values)
    cache.take_others(source)
    cache.valid, cache.positions = source.valid, source.positions
    if cache.inputs is not None and source.inputs is not None:
        cache.inputs.share(source.inputs)
    if source.own:
        cache.check_batch(source.own[0].dense()[0].shape[0])
