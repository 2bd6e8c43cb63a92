"""Rows in tiles of a few tokens: what packed codes stand in, so that compiled kernels read them from first to last.

Within a tile the tokens of one column stand side by side, and fill a vector register; tiles follow one another. A pass
over a run of tokens is then one pass over memory, and a column of a few tokens is one load. The last tile of a buffer
without spare capacity has no more slots than it needs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvgauge.kernels.cpu.stored_rows import TILE
from kvgauge.store.buffers import GROWTH_STEP
from kvgauge.store.steps import Steps


class TiledBuffer:
    """Rows (…, tokens, width), in storage with spare capacity.

    Args:
        step: tokens of capacity added when the storage is full.

    Attributes:
        stored: (…, slots · width): tiles (width, `TILE`), the last one (width, what is left).
        slots: tokens that there is room for, `lead` included.
        lead: slots of the first tile that stay empty.
    """

    def __init__(self, step: int = GROWTH_STEP) -> None:
        self.step = step
        self.length = self.lead = self.slots = self.width = 0
        self.stored: Tensor | None = None
        self._reserved = 0
        self._fixed: tuple[int, Tensor] | None = None  # slots before the shape was fixed, and the count of rows since

    def begin(self, lead: int) -> None:
        """Leave so many slots of the first tile empty, below `TILE`; the buffer must be empty."""
        self.lead = lead

    def reserve(self, tokens: int) -> None:
        """Capacity for `tokens` tokens in all, at the next append at the latest."""
        self._reserved = tokens
        if self.stored is not None and self.lead + tokens > self.slots:
            self._resize(_whole(self.lead + tokens))

    def append(self, rows: Tensor) -> None:
        """Add rows (…, new tokens, width); one, where the shape is fixed."""
        if self._fixed is not None:
            self._put(rows, self._fixed[0] + self._fixed[1])
            return
        new = rows.shape[-2]
        first = self.lead + self.length
        if self.stored is None:
            self.width = rows.shape[-1]
            self.slots = _whole(self.lead + max(new, self.step, self._reserved))
            self.stored = rows.new_zeros(*rows.shape[:-2], self.slots * self.width)
        elif first + new > self.slots or self.slots % TILE:
            self._resize(_whole(first + max(new, self.step)))
        self.length += new
        tiles, _ = self._tiles()
        begun = min(-first % TILE, new)  # of the tile that is not full yet
        whole = (new - begun) // TILE * TILE
        for start, stop in ((0, begun), (begun + whole, new)):
            if stop > start:
                tile, slot = divmod(first + start, TILE)
                tiles[..., tile, :, slot : slot + stop - start].copy_(rows[..., start:stop, :].mT)
        if whole:
            tile = (first + begun) // TILE
            middle = rows[..., begun : begun + whole, :].unflatten(-2, (-1, TILE)).mT
            tiles[..., tile : tile + whole // TILE, :, :].copy_(middle)

    def _put(self, row: Tensor, slot: Tensor) -> None:
        """Write one row (…, 1, width) in a slot whose number is on the device, (1,)."""
        assert self.stored is not None
        columns = torch.arange(self.width, device=slot.device) * TILE
        places = slot // TILE * (self.width * TILE) + columns + slot % TILE
        self.stored.index_copy_(-1, places, row.squeeze(-2))

    def fix(self, steps: Steps) -> None:
        """See `kvgauge.store.rows.RowBuffer.fix`."""
        assert self.stored is not None
        start = self.lead + self.length
        self._resize(_whole(start + steps.room))
        self.length += steps.room
        torch._dynamo.mark_static_address(self.stored)
        self._fixed = start, steps.on(self.stored.device)

    def release(self, steps: Steps) -> None:
        """See `kvgauge.store.rows.RowBuffer.release`."""
        self.length += steps.count() - steps.room
        self._fixed = None

    def block(self, start: int, stop: int) -> Tensor:
        """A copy of the rows from `start` to `stop`, (…, stop − start, width)."""
        tiles, last = self._tiles()
        first, end, whole = self.lead + start, self.lead + stop, tiles.shape[-3] * TILE
        tile = min(first, whole) // TILE
        rows = tiles[..., tile : -(-min(end, whole) // TILE), :, :].mT.flatten(-3, -2)
        rows = rows if end <= whole else torch.cat([rows, last.mT], dim=-2)
        return rows[..., first - tile * TILE : end - tile * TILE, :]

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens` rows; what a tile holds behind them becomes zero."""
        self.length = min(self.length, tokens)
        tile, slot = divmod(self.lead + self.length, TILE)
        if self.stored is not None and slot:
            tiles, last = self._tiles()
            (tiles[..., tile, :, slot:] if tile < tiles.shape[-3] else last[..., slot:]).zero_()

    def trim(self) -> None:
        """Give back spare capacity."""
        if self.stored is not None and self.slots > self.lead + self.length:
            self._resize(self.lead + self.length)

    def room(self) -> int:
        """Rows that `append` can add and `crop` take back without a trace."""
        return 0 if self.stored is None or self.slots % TILE else self.slots - self.lead - self.length

    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        """Apply `select` to the storage: reorder, repeat or pick sequences of the batch."""
        if self.stored is not None:
            self.stored = select(self.stored)

    def clear(self) -> None:
        """Free the storage."""
        self.stored, self.length, self.lead, self.slots = None, 0, 0, 0
        self._fixed = None

    def nbytes(self) -> int:
        """Bytes of the live storage, spare capacity included."""
        return 0 if self.stored is None else self.stored.untyped_storage().nbytes()

    def __len__(self) -> int:
        return self.length

    def _tiles(self) -> tuple[Tensor, Tensor]:
        """Views of the whole tiles (…, tiles, width, TILE), and of the last one (…, width, fewer)."""
        assert self.stored is not None
        whole, left = divmod(self.slots, TILE)
        split = whole * TILE * self.width
        tiles = self.stored[..., :split].unflatten(-1, (whole, self.width, TILE))
        return tiles, self.stored[..., split:].unflatten(-1, (self.width, left))

    def _resize(self, slots: int) -> None:
        assert self.stored is not None
        before, last = self._tiles()
        left = self.slots - before.shape[-3] * TILE
        resized = self.stored.new_zeros(*self.stored.shape[:-1], slots * self.width)
        self.stored, self.slots = resized, slots
        tiles, shorter = self._tiles()
        kept = min(before.shape[-3], tiles.shape[-3])
        tiles[..., :kept, :, :] = before[..., :kept, :, :]
        if kept < tiles.shape[-3]:
            tiles[..., kept, :, :left] = last
        elif kept < before.shape[-3]:
            shorter.copy_(before[..., kept, :, : shorter.shape[-1]])


def _whole(slots: int) -> int:
    """In whole tiles."""
    return -(-slots // TILE) * TILE
