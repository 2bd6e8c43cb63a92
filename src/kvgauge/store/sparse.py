"""Outliers beside a dense matrix of codes: compressed sparse rows that grow along tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvgauge.store.buffers import GrowingBuffer


def index_dtype(width: int) -> torch.dtype:
    """The smallest type that numbers `width` channels."""
    return torch.int16 if width <= torch.iinfo(torch.int16).max else torch.int32


class SparseRows:
    """Exact entries of rows (batch, tokens, width): per token how many, per entry its channel and its value.

    Sequences of a batch have different numbers of entries, so each has buffers of its own.

    Args:
        width: channels of a row.
        dtype: of the stored values, 16 bits.
    """

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self.width, self.dtype = width, dtype
        self.counts = GrowingBuffer()  # (batch, tokens, 1) int16
        self.channels: list[GrowingBuffer] = []  # of each sequence, (entries, 1)
        self.entries: list[GrowingBuffer] = []

    def append(self, rows: Tensor, chosen: Tensor) -> None:
        """Add tokens.

        Args:
            rows: (batch, new tokens, width).
            chosen: the same shape, True where an entry is kept.
        """
        self.counts.append(chosen.sum(dim=-1, keepdim=True, dtype=torch.int16))
        if not self.channels:
            self.channels, self.entries = ([GrowingBuffer() for _ in rows] for _ in range(2))
        for sequence, (row, mask) in enumerate(zip(rows, chosen, strict=True)):
            channels = mask.nonzero()[:, 1:]
            if len(channels):
                self.channels[sequence].append(channels.to(index_dtype(self.width)))
                self.entries[sequence].append(row[mask].to(self.dtype).unsqueeze(-1))

    def offsets(self) -> Tensor:
        """Entries before each token and after the last, (batch, tokens + 1)."""
        return torch.nn.functional.pad(self.counts.view()[..., 0].cumsum(1), (1, 0))

    def write(self, block: Tensor, start: int, offsets: Tensor) -> None:
        """Put the entries of the tokens from `start` on in their places.

        Args:
            block: (batch, tokens of the block, width), changed in place.
            start: first token of the block.
            offsets: from `offsets`.
        """
        stop = start + block.shape[1]
        tokens = torch.arange(block.shape[1], device=block.device)
        for sequence, (first, last) in enumerate(offsets[:, [start, stop]].tolist()):
            if first == last:
                continue
            counts = self.counts.view()[sequence, start:stop, 0].long()
            channels = self.channels[sequence].view()[first:last, 0].long()
            entries = self.entries[sequence].view()[first:last, 0].to(block.dtype)
            block[sequence].index_put_((tokens.repeat_interleave(counts), channels), entries)

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens` tokens."""
        kept = self.offsets()[:, min(tokens, len(self.counts))].tolist()
        for buffers in (self.channels, self.entries):
            for buffer, count in zip(buffers, kept, strict=True):
                buffer.crop(count)
        self.counts.crop(tokens)

    def trim(self) -> None:
        """Give back spare capacity."""
        for buffer in self._all():
            buffer.trim()

    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        """See `GrowingBuffer.map_batch`."""
        self.counts.map_batch(select)
        chosen = select(torch.arange(len(self.channels))).tolist()
        self.channels = [_copy(self.channels[sequence]) for sequence in chosen]
        self.entries = [_copy(self.entries[sequence]) for sequence in chosen]

    def clear(self) -> None:
        self.counts.clear()
        self.channels, self.entries = [], []

    def nbytes(self) -> int:
        """Bytes of the live storage."""
        return sum(buffer.nbytes() for buffer in self._all())

    def _all(self) -> Sequence[GrowingBuffer]:
        return (self.counts, *self.channels, *self.entries)


def _copy(buffer: GrowingBuffer) -> GrowingBuffer:
    copy = GrowingBuffer()
    if len(buffer):
        copy.set(buffer.view().clone())
    return copy
