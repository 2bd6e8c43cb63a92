"""Compression while decoding: what has grown behind a compressed context is compressed too, every so many tokens.

The moments are the multiples of `every` tokens behind the context, those of the question counted. There the bytes keep
to the budget of the whole sequence; between two of them it holds up to `every` tokens more than that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from kvgauge.errors import UserError, unknown

if TYPE_CHECKING:
    from kvgauge.contract.fitted import Fitted
    from kvgauge.contract.method import Method
    from kvgauge.layers.cache import KVCache

FIELDS = ("every",)


def tokens_between(name: str, given: Mapping[str, int] | None) -> int | None:
    """Tokens between two compressions of what a method's option `given` says; None compresses the context alone.

    Raises:
        UserError: unknown or missing keys, or a number below 1.
    """
    if given is None:
        return None
    for key in given:
        if key not in FIELDS:
            raise unknown(f"field of while_decoding of {name}", str(key), FIELDS)
    if "every" not in given:
        raise UserError(f"while_decoding of {name} says no number of tokens: give one, e.g. {{every: 64}}")
    if given["every"] < 1:
        raise UserError(
            f"every {given['every']} in while_decoding of {name} is below 1: it is the number of tokens between two "
            f"compressions"
        )
    return int(given["every"])


def new_cache(
    method: Method, model: PreTrainedModel, fitted: Fitted | None = None, *, context_length: int | None = None
) -> KVCache:
    """`Method.new_cache`, of a method that does what its `while_decoding` says.

    Raises:
        UserError: as `Method.new_cache`, or the method takes no notice of the option.
    """
    cache = method.new_cache(model, fitted, context_length=context_length)
    if cache.every != method.every:
        raise UserError(f"{method.name} compresses a context once, it has no while_decoding: leave it out")
    return cache


def cell_label(method: Method) -> str:
    """The name of a cell: the method's label, and behind ``~`` the tokens between two compressions while decoding."""
    return method.label if method.every is None else f"{method.label}~{method.every}"
