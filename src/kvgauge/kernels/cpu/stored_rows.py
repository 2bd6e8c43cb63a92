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
CODED_BITS = (1, 2, 3, 4, 8)


class StoredRows(NamedTuple):
    """Rows in memory that outlives the call they are handed to: the ``Stored`` of the kernels, which says what is what.

    Addresses, numbers of things, and strides in numbers; 0 where there is nothing.
    """

    kind: int = 0
    numbers: int = 0
    parameters: int = 0
    balance: int = 0
    table: int = 0
    tokens: int = 0
    dim: int = 0
    bits: int = 0
    lead: int = 0
    group: int = 0
    minima: int = 0
    missing: int = 0
    slots: int = 0
    row_stride: int = 0
    sequence_stride: int = 0
    head_stride: int = 0
    parameters_sequence_stride: int = 0
    parameters_head_stride: int = 0
    balance_sequence_stride: int = 0
    balance_head_stride: int = 0
    beside: int = 0
    rotation: int = 0
    rotated: int = 0
    head_rows: int = 0

    def turned(self, rotation: Tensor) -> StoredRows:
        """The rows of what queries are asked as ``query @ rotation``, and sums become ``sums @ rotationᵀ``.

        Args:
            rotation: (numbers of a row, channels) float32, contiguous: channels of all pieces that stand side by side.
        """
        return self._replace(rotation=rotation.data_ptr(), rotated=rotation.shape[0])


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
    sequence, head = _head_strides(rows)
    return StoredRows(
        kind=kind,
        numbers=rows.data_ptr(),
        tokens=rows.shape[2],
        dim=rows.shape[3],
        row_stride=rows.stride(2),
        sequence_stride=sequence,
        head_stride=head,
        head_rows=shared,
    )


def coded_rows(
    codes: Tensor,
    parameters: Tensor,
    *,
    slots: int,
    tokens: int,
    dim: int,
    bits: int,
    levels: Tensor,
    lead: int = 0,
    balance: Tensor | None = None,
    channel_groups: int = 0,
    minima: bool = True,
    token_group: int = 0,
    missing: int = 0,
    beside: int = 0,
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
        minima: groups of channels have scales and minima; False: they have scales alone.
        token_group: tokens of a group.
        missing: tokens that the first group is short of.
        beside: 0, or the first channel of rows that hold more channels of the tokens of the piece before.
        shared: as in `plain_rows`.
    """
    if codes.device.type != "cpu" or bits not in CODED_BITS or token_group % TILE:
        return None
    for tensor in (codes, parameters):
        if not tensor[0, 0].is_contiguous():
            return None
    sequence, head = _head_strides(codes)
    parameters_sequence, parameters_head = _head_strides(parameters)
    balance_sequence, balance_head = (0, 0) if balance is None else _head_strides(balance)
    return StoredRows(
        kind=TOKEN_CODES if channel_groups else CHANNEL_CODES,
        numbers=codes.data_ptr(),
        parameters=parameters.data_ptr(),
        balance=0 if balance is None else balance.data_ptr(),
        table=levels.data_ptr(),
        tokens=tokens,
        dim=dim,
        bits=bits,
        lead=lead,
        group=channel_groups or token_group,
        minima=int(minima),
        missing=missing,
        slots=slots,
        sequence_stride=sequence,
        head_stride=head,
        parameters_sequence_stride=parameters_sequence,
        parameters_head_stride=parameters_head,
        balance_sequence_stride=balance_sequence,
        balance_head_stride=balance_head,
        beside=beside,
        head_rows=shared,
    )


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
    return [word for one in rows for word in one]
