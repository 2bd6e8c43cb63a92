"""Outliers beside a dense matrix of codes: compressed sparse rows that grow along tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvgauge.store.buffers import GROWTH_STEP, GrowingBuffer


def index_dtype(width: int) -> torch.dtype:
    """The smallest type that numbers `width` channels."""
    return torch.int16 if width <= torch.iinfo(torch.int16).max else torch.int32


class SparseRows:
    """Exact entries of rows (batch, tokens, width): per token how many, per entry its channel and its value.

    Sequences of a batch have different numbers of entries, so each has buffers of its own. How many there are depends
    on the numbers, and a device would have to be waited for at every token: the latest ones stand in full rows, not a
    number where there is no entry, until `GROWTH_STEP` of them are made sparse at once.

    Args:
        width: channels of a row.
        dtype: of the stored values, 16 bits.
        block: tokens that `write` is asked for at a time.
    """

    def __init__(self, width: int, dtype: torch.dtype, block: int) -> None:
        self.width, self.dtype, self.block = width, dtype, block
        self.counts = GrowingBuffer()  # (batch, tokens, 1) int16
        self.channels: list[GrowingBuffer] = []  # of each sequence, (entries, 1)
        self.entries: list[GrowingBuffer] = []
        self.latest = GrowingBuffer()  # (batch, tokens, width), behind the others
        self._bounds: list[list[int]] = []  # of each sequence: its entries before every block, and all

    def append(self, rows: Tensor, chosen: Tensor) -> None:
        """Add tokens.

        Args:
            rows: (batch, new tokens, width).
            chosen: the same shape, True where an entry is kept.
        """
        new = rows.shape[1]
        if len(self.latest) + new >= GROWTH_STEP:
            self._settle()
        if new >= GROWTH_STEP:
            self._add(rows, chosen)
        elif new:
            self.latest.append(rows.masked_fill(~chosen, torch.nan).to(self.dtype))

    def _settle(self) -> None:
        """Make the latest rows sparse."""
        if len(self.latest):
            rows = self.latest.view()
            self._add(rows, ~rows.isnan())
            self.latest.clear()

    def _add(self, rows: Tensor, chosen: Tensor) -> None:
        self.counts.append(chosen.sum(dim=-1, keepdim=True, dtype=torch.int16))
        if not self.channels:
            self.channels, self.entries = ([GrowingBuffer() for _ in rows] for _ in range(2))
        for sequence, (row, mask) in enumerate(zip(rows, chosen, strict=True)):
            channels = mask.nonzero()[:, 1:]
            if len(channels):
                self.channels[sequence].append(channels.to(index_dtype(self.width)))
                self.entries[sequence].append(row[mask].to(self.dtype).unsqueeze(-1))
        self._bounds = []

    def _offsets(self) -> Tensor:
        """Entries before each sparse token and after the last, (batch, tokens + 1)."""
        return torch.nn.functional.pad(self.counts.view()[..., 0].cumsum(1), (1, 0))

    def write(self, block: Tensor, start: int) -> None:
        """Put the entries of the tokens from `start` on in their places.

        Args:
            block: (batch, tokens of the block, width), changed in place.
            start: first token of the block, a multiple of the block's size.
        """
        sparse = len(self.counts)
        stop = min(start + block.shape[1], sparse)
        if start < stop:
            self._write_sparse(block[:, : stop - start], start, stop)
        first, last = max(start, sparse), start + block.shape[1]
        if first < last:
            latest = self.latest.view()[:, first - sparse : last - sparse].to(block.dtype)
            target = block[:, first - start :]
            target.copy_(torch.where(latest.isnan(), target, latest))

    def _write_sparse(self, block: Tensor, start: int, stop: int) -> None:
        if not self._bounds:
            starts = torch.tensor([*range(0, len(self.counts), self.block), len(self.counts)], device=block.device)
            self._bounds = self._offsets().index_select(1, starts).tolist()
        tokens, place = torch.arange(stop - start, device=block.device), start // self.block
        for sequence, bounds in enumerate(self._bounds):
            first, last = bounds[place], bounds[place + 1]
            if first == last:
                continue
            counts = self.counts.view()[sequence, start:stop, 0].long()
            channels = self.channels[sequence].view()[first:last, 0].long()
            entries = self.entries[sequence].view()[first:last, 0].to(block.dtype)
            of_entries = tokens.repeat_interleave(counts, output_size=last - first)
            block[sequence].index_put_((of_entries, channels), entries)

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens` tokens."""
        self.latest.crop(max(0, tokens - len(self.counts)))
        if tokens >= len(self.counts):
            return
        kept = self._offsets()[:, tokens].tolist()
        for buffers in (self.channels, self.entries):
            for buffer, count in zip(buffers, kept, strict=True):
                buffer.crop(count)
        self.counts.crop(tokens)
        self._bounds = []

    def trim(self) -> None:
        """Give back spare capacity; everything becomes sparse."""
        self._settle()
        for buffer in self._all():
            buffer.trim()

    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        """See `GrowingBuffer.map_batch`."""
        self.counts.map_batch(select)
        self.latest.map_batch(select)
        chosen = select(torch.arange(len(self.channels))).tolist() if self.channels else []
        self.channels = [_copy(self.channels[sequence]) for sequence in chosen]
        self.entries = [_copy(self.entries[sequence]) for sequence in chosen]
        self._bounds = []

    def clear(self) -> None:
        self.counts.clear()
        self.latest.clear()
        self.channels, self.entries, self._bounds = [], [], []

    def nbytes(self) -> int:
        """Bytes of the live storage."""
        return sum(buffer.nbytes() for buffer in self._all())

    def _all(self) -> Sequence[GrowingBuffer]:
        return (self.counts, self.latest, *self.channels, *self.entries)


def _copy(buffer: GrowingBuffer) -> GrowingBuffer:
    copy = GrowingBuffer()
    if len(buffer):
        copy.set(buffer.view().clone())
    return copy
