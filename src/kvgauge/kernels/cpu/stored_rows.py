"""What compiled kernels are told of rows in the form in which they are stored: see ``Stored`` in ``stored_rows.h``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

PLAIN = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TOKEN_CODES, CHANNEL_CODES = 3, 4
TILE = 16  # tokens of a tile of codes
CODED_BITS = (2, 3, 4, 8)


class StoredRows(NamedTuple):
    """Rows in memory that outlives the call they are handed to.

    Attributes:
        words: what the kernels read, in the order of their ``Stored``.
        tokens: rows of a head.
        dim: numbers of a row.
    """

    words: tuple[int, ...]
    tokens: int
    dim: int


def plain_rows(rows: Tensor, *, shared: int = 0) -> StoredRows | None:
    """Rows as they are; None where the kernels cannot read them.

    Args:
        rows: (batch or 1, heads or 1, tokens, dimension), the numbers of a row side by side.
        shared: how many rows each head has of those that all heads share; 0: every head has rows of its own.
    """
    kind = PLAIN.get(rows.dtype)
    if kind is None or (rows.requires_grad and torch.is_grad_enabled()):
        return None
    if rows.device.type != "cpu" or (rows.stride(3) != 1 and rows.shape[3] > 1):
        return None
    tokens, dim = rows.shape[2:]
    row, strides = rows.stride(2), _head_strides(rows)
    words = (kind, rows.data_ptr(), 0, 0, 0, tokens, dim, 0, 0, 0, 0, 0, row, *strides, 0, 0, 0, 0, shared)
    return StoredRows(words, tokens, dim)


def coded_rows(
    codes: Tensor,
    parameters: Tensor,
    *,
    slots: int,
    tokens: int,
    dim: int,
    bits: int,
    levels: Tensor | None,
    lead: int = 0,
    balance: Tensor | None = None,
    channel_groups: int = 0,
    token_group: int = 0,
    missing: int = 0,
    shared: int = 0,
) -> StoredRows | None:
    """Rows in packed codes; None where the kernels cannot read them.

    Args:
        codes: (batch or 1, heads or 1, slots · packed dimension) uint8 in tiles, see `kvgauge.store.tiles`.
        parameters: float16 scales and minima: (batch, heads or 1, slots · 2 · groups) of every token, in tiles too, or
            (batch, heads or 1, groups, 2 · dim) of every group of tokens.
        slots: tokens that there is room for.
        tokens, dim: of the rows.
        bits: of a code.
        levels: (16,) float32, what codes below 8 bits stand for, repeated where there are fewer.
        lead: slots of the first tile without a token.
        balance: (batch, heads or 1, 1, dim) float16, factors of channels.
        channel_groups: groups of a token's channels; 0 where groups are of tokens.
        token_group: tokens of a group.
        missing: tokens that the first group is short of.
        shared: as in `plain_rows`.
    """
    if codes.device.type != "cpu" or bits not in CODED_BITS or token_group % TILE:
        return None
    for tensor in (codes, parameters):
        if not tensor[0, 0].is_contiguous():
            return None
    kind = TOKEN_CODES if channel_groups else CHANNEL_CODES
    words = (
        kind,
        codes.data_ptr(),
        parameters.data_ptr(),
        0 if balance is None else balance.data_ptr(),
        0 if levels is None else levels.data_ptr(),
        tokens,
        dim,
        bits,
        lead,
        channel_groups or token_group,
        missing,
        slots,
        0,
        *_head_strides(codes),
        *_head_strides(parameters),
        *((0, 0) if balance is None else _head_strides(balance)),
        shared,
    )
    return StoredRows(words, tokens, dim)


def _head_strides(tensor: Tensor) -> tuple[int, int]:
    """Of sequences and of heads, 0 where all have the same."""
    return tensor.stride(0) if tensor.shape[0] > 1 else 0, tensor.stride(1) if tensor.shape[1] > 1 else 0


@cache
def evenly_spaced(bits: int) -> Tensor:
    """The levels 0 … 2 ** bits − 1, (16,); of 8 bits the codes are the levels."""
    return repeated(torch.arange(2**bits, dtype=torch.float32))


def repeated(levels: Tensor) -> Tensor:
    """A code book as the kernels read it, (16,)."""
    return levels.float().repeat(max(1, TILE // levels.numel())).contiguous()


def flat(rows: Sequence[StoredRows]) -> list[int]:
    """The words of several, one after another."""
    return [word for one in rows for word in one.words]
