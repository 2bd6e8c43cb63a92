"""From a share of bytes to sizes: every method says what a size takes, and one search finds the largest that fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from kvgauge.architecture.facts import ModelFacts
from kvgauge.contract.method import Method
from kvgauge.errors import UserError

TOLERANCE = 1.02  # measured bytes may be this much above the budget

ROUNDING = 1e-9  # of a budget, which is a decimal fraction that binary numbers only come close to

Size = TypeVar("Size")


def reference_nbytes(method: Method, facts: ModelFacts, tokens: int) -> int:
    """Bytes of the uncompressed cache of `tokens` tokens of one sequence: what the method's budget is a share of.

    It is transformers' own: layers with a window hold a window, and states are what they are. `Needs.reference_bits`
    concerns the layers that may be compressed.
    """
    bits = method.needs.reference_bits
    return facts.compressed_nbytes(tokens, bits) + facts.others_nbytes(tokens)


def allowed_nbytes(method: Method, facts: ModelFacts, tokens: int) -> float:
    """Bytes that the budget of a method leaves to the layers that it compresses, of one sequence of `tokens` tokens.

    Raises:
        UserError: the layers that are left to transformers take all of it.
    """
    assert method.budget is not None
    others, reference = facts.others_nbytes(tokens), reference_nbytes(method, facts, tokens)
    if others and others >= method.budget * reference:
        raise UserError(
            f"budget {method.budget:g} of {method.name}: the layers of {facts.name} that are not compressed (windows, "
            f"states) take {others / reference:.3g} of the cache at {tokens} tokens: raise the budget or the length"
        )
    return method.budget * reference - others


def largest(low: int, high: int, nbytes: Callable[[int], float], allowed: float) -> int | None:
    """The largest size from `low` to `high` whose bytes are at most `allowed`; None where even `low` takes more.

    Args:
        low, high: the sizes there are: ranks, entries, tokens, steps of a share.
        nbytes: of a size, rising with it. It may refuse a size that is too small (`UserError`).
        allowed: bytes, or whatever `nbytes` counts.
    """

    def fits(size: int) -> bool | None:
        try:
            return nbytes(size) <= allowed * (1 + ROUNDING) + ROUNDING
        except UserError:
            return None

    if fits(high):
        return high
    best = None
    while low < high:  # high does not fit
        middle = (low + high) // 2
        fitting = fits(middle)
        if fitting is False:
            high = middle
        else:
            best = middle if fitting else best
            low = middle + 1
    return best


def most(sizes: Sequence[Size], nbytes: Callable[[Size], float], allowed: float) -> Size | None:
    """`largest` among a few sizes in rising order, e.g. numbers of bits."""
    index = largest(0, len(sizes) - 1, lambda place: nbytes(sizes[place]), allowed)
    return None if index is None else sizes[index]


def check_reached(method: Method, facts: ModelFacts, tokens: int, nbytes: float) -> None:
    """Refuse a budget that the smallest size of a method does not keep to.

    Raises:
        UserError: `nbytes`, of the compressed layers after a context of `tokens` tokens, are more than it allows.
    """
    if method.budget is not None and nbytes > TOLERANCE * allowed_nbytes(method, facts, tokens):
        least = (nbytes + facts.others_nbytes(tokens)) / reference_nbytes(method, facts, tokens)
        raise UserError(
            f"budget {method.budget:g} of {method.name} is below the {least:.3g} that it reaches on {tokens} tokens: "
            f"raise the budget or give a longer context"
        )
