"""Codes of 1 to 8 bits, side by side in bytes: what a quantised cache really stores."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 8  # codes of b bits fill b whole bytes


def packed_size(count: int, bits: int) -> int:
    """Bytes of `count` codes: whole bytes for 1, 2, 4 and 8 bits, whole groups of 8 codes for the others."""
    return -(-count // GROUP) * bits if GROUP % bits else -(-count * bits // GROUP)


def pack(codes: Tensor, bits: int) -> Tensor:
    """The codes of the last dimension, packed, first code in the lowest bits.

    Args:
        codes: (…, n) uint8, each below ``2 ** bits``.
        bits: 1 … 8.

    Returns:
        (…, packed_size(n, bits)) uint8.
    """
    if bits == GROUP:
        return codes.clone()
    per_unit = GROUP if GROUP % bits else GROUP // bits
    missing = -codes.shape[-1] % per_unit
    units = torch.nn.functional.pad(codes, (0, missing)).unflatten(-1, (-1, per_unit))
    word_type = torch.int64 if GROUP % bits else torch.uint8
    word = torch.zeros(units.shape[:-1], dtype=word_type, device=codes.device)
    for position in range(per_unit):
        word |= units[..., position].to(word_type) << (position * bits)
    if word_type == torch.uint8:
        return word
    shifts = torch.arange(0, GROUP * bits, GROUP, device=codes.device)
    return (word.unsqueeze(-1) >> shifts).bitwise_and_(255).to(torch.uint8).flatten(-2)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`.

    Args:
        packed: (…, packed_size(count, bits)) uint8.
        bits: 1 … 8.
        count: n, codes along the last dimension.

    Returns:
        (…, n) uint8.
    """
    if bits == GROUP:
        return packed[..., :count].clone()
    mask = 2**bits - 1
    if GROUP % bits:
        shifts = torch.arange(0, GROUP * bits, GROUP, device=packed.device)
        word = (packed.unflatten(-1, (-1, bits)).to(torch.int64) << shifts).sum(-1)
        places = torch.arange(0, GROUP * bits, bits, device=packed.device)
    else:
        word = packed
        places = torch.arange(0, GROUP, bits, device=packed.device, dtype=torch.uint8)
    codes = (word.unsqueeze(-1) >> places).bitwise_and_(mask).to(torch.uint8)
    return codes.flatten(-2)[..., :count]
