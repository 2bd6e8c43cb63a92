"""Rows in tiles of a few tokens: what packed codes stand in, so that compiled kernels read them from first to last.

Within a tile the tokens of one column stand side by side, and fill a vector register; tiles follow one another. A pass
over a run of tokens is then one pass over memory, and a column of a few tokens is one load.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kvgauge.kernels.cpu.stored_rows import TILE
from kvgauge.store.buffers import GROWTH_STEP


def tiled(tokens: int) -> int:
    """Tokens that have room in as few whole tiles as hold `tokens`."""
    return -(-tokens // TILE) * TILE


class TiledBuffer:
    """Rows (…, tokens, width), kept as (…, tiles, width, `TILE`) with spare capacity.

    Args:
        step: tokens of capacity added when the storage is full.
    """

    def __init__(self, step: int = GROWTH_STEP) -> None:
        self.step = step
        self.length = 0
        self.lead = 0  # slots of the first tile that stay empty
        self.stored: Tensor | None = None
        self._reserved = 0

    def begin(self, lead: int) -> None:
        """Leave so many slots of the first tile empty, below `TILE`; the buffer must be empty."""
        self.lead = lead

    def reserve(self, tokens: int) -> None:
        """Capacity for `tokens` tokens in all, at the next append at the latest."""
        self._reserved = tokens
        if self.stored is not None and self.lead + tokens > self._slots:
            self._resize(self.lead + tokens)

    def append(self, rows: Tensor) -> None:
        """Add rows (…, new tokens, width)."""
        new = rows.shape[-2]
        first = self.lead + self.length
        if self.stored is None:
            slots = self.lead + max(new, self.step, self._reserved)
            self.stored = rows.new_zeros(*rows.shape[:-2], tiled(slots) // TILE, rows.shape[-1], TILE)
        elif first + new > self._slots:
            self._resize(first + max(new, self.step))
        self.length += new
        begun = min(-first % TILE, new)  # of the tile that is not full yet
        whole = (new - begun) // TILE * TILE
        for start, stop in ((0, begun), (begun + whole, new)):
            if stop > start:
                tile, slot = divmod(first + start, TILE)
                self.stored[..., tile, :, slot : slot + stop - start].copy_(rows[..., start:stop, :].mT)
        if whole:
            tile = (first + begun) // TILE
            tiles = rows[..., begun : begun + whole, :].unflatten(-2, (-1, TILE)).mT
            self.stored[..., tile : tile + whole // TILE, :, :].copy_(tiles)

    def block(self, start: int, stop: int) -> Tensor:
        """A copy of the rows from `start` to `stop`, (…, stop − start, width)."""
        tiles, skipped = self.tiles(start, stop)
        return tiles.mT.flatten(-3, -2)[..., skipped : skipped + stop - start, :]

    def tiles(self, start: int, stop: int) -> tuple[Tensor, int]:
        """The tiles that hold the rows from `start` to `stop`, a view, and slots in front of the first of these."""
        assert self.stored is not None
        first, last = self.lead + start, self.lead + stop
        return self.stored[..., first // TILE : -(-last // TILE), :, :], first % TILE

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens` rows."""
        self.length = min(self.length, tokens)

    def trim(self) -> None:
        """Give back tiles without a row."""
        if self.stored is not None and self._slots > tiled(self.lead + self.length):
            self._resize(self.lead + self.length)

    def room(self) -> int:
        """Rows that `append` can add and `crop` take back without a trace."""
        return 0 if self.stored is None else self._slots - self.lead - self.length

    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        """Apply `select` to the storage: reorder, repeat or pick sequences of the batch."""
        if self.stored is not None:
            self.stored = select(self.stored)

    def clear(self) -> None:
        """Free the storage."""
        self.stored, self.length, self.lead = None, 0, 0

    def nbytes(self) -> int:
        """Bytes of the live storage, spare capacity included."""
        return 0 if self.stored is None else self.stored.untyped_storage().nbytes()

    def __len__(self) -> int:
        return self.length

    @property
    def _slots(self) -> int:
        assert self.stored is not None
        return self.stored.shape[-3] * TILE

    def _resize(self, slots: int) -> None:
        assert self.stored is not None
        *outer, _, width, _ = self.stored.shape
        kept = min(self.stored.shape[-3], tiled(slots) // TILE)
        resized = self.stored.new_zeros(*outer, tiled(slots) // TILE, width, TILE)
        resized[..., :kept, :, :] = self.stored[..., :kept, :, :]
        self.stored = resized
