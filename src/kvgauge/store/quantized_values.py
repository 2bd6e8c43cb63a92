"""Asymmetric uniform quantisation: codes, a scale and a minimum per group of numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)


class Quantized(NamedTuple):
    """``minimum + scale · codes``.

    Attributes:
        codes: uint8, shaped as the numbers.
        scale, minimum: float16, of size 1 along the grouped dimension.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor


def quantize(values: Tensor, bits: int, dim: int, valid: Tensor | None = None) -> Quantized:
    """Quantise to ``2 ** bits`` equally spaced levels between the smallest and the largest number along `dim`.

    Scale and minimum are rounded to float16 first and the codes are chosen for the rounded ones, so their rounding
    costs next to nothing.

    Args:
        values: floating point; one group is everything along `dim`.
        bits: 1 … 8.
        dim: along which the numbers share scale and minimum.
        valid: broadcastable to `values`; numbers that are False have no part in scale and minimum.
    """
    levels = 2**bits - 1
    exact = values.float()
    shown, hidden = exact, exact
    if valid is not None:
        shown, hidden = exact.masked_fill(~valid, torch.inf), exact.masked_fill(~valid, -torch.inf)
    low, high = shown.amin(dim, keepdim=True), hidden.amax(dim, keepdim=True)
    if valid is not None:
        low, high = (bound.masked_fill(bound.isinf(), 0.0) for bound in (low, high))  # a group of padding alone
    minimum = low.half()
    scale = ((high - minimum.float()).clamp_min(0.0) / levels).half()
    step = torch.where(scale > 0, scale, 1.0).float()
    codes = ((exact - minimum.float()) / step).round_().clamp_(0, levels).to(torch.uint8)
    return Quantized(codes, scale, minimum)
