"""Rows of numbers as packed codes of non-uniform levels, with outliers beside them (KVQuant, arXiv 2401.18079)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kvgauge.architecture.planes import BLOCK
from kvgauge.methods.kvquant.grid import Grid
from kvgauge.store.bit_packing import GROUP, pack, packed_size, unpack
from kvgauge.store.buffers import GrowingBuffer
from kvgauge.store.sparse import SparseRows, index_dtype


class Rows(ABC):
    """Stored rows (batch, tokens, width) that are read block by block."""

    @abstractmethod
    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all, at the next append at the latest."""

    @abstractmethod
    def append(self, rows: Tensor) -> None:
        """Add rows (batch, new tokens, width)."""

    @abstractmethod
    def trim(self) -> None:
        """Give back spare capacity."""

    @abstractmethod
    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """First token and rows (batch, up to `BLOCK` tokens, width) of every block, float32.

        A block may be changed, and is gone with the next one: all share one workspace.
        """

    @abstractmethod
    def __len__(self) -> int:
        """Tokens."""

    @abstractmethod
    def nbytes_by_part(self) -> dict[str, int]:
        """Bytes of the live storage of all sequences, by what they are for."""

    @abstractmethod
    def crop(self, tokens: int) -> None:
        """Keep the first `tokens` tokens."""

    @abstractmethod
    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        """Reorder, repeat or pick sequences of the batch."""

    @abstractmethod
    def clear(self) -> None:
        """Free the storage."""


class PlainRows(Rows):
    """Rows as they are: the quantiser switched off."""

    def __init__(self) -> None:
        self.rows = GrowingBuffer()

    def reserve(self, tokens: int) -> None:
        self.rows.reserve(tokens)

    def append(self, rows: Tensor) -> None:
        self.rows.append(rows)

    def trim(self) -> None:
        self.rows.trim()

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, len(self), BLOCK):
            yield start, self.rows.view()[:, start : start + BLOCK].to(torch.float32, copy=True)

    def clear(self) -> None:
        self.rows.clear()

    def __len__(self) -> int:
        return len(self.rows)

    def nbytes_by_part(self) -> dict[str, int]:
        return {"exact": self.rows.nbytes()}

    def crop(self, tokens: int) -> None:
        self.rows.crop(tokens)

    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        self.rows.map_batch(select)


class CodedRows(Rows):
    """A code per number, scales where the grid has them per token, and outliers.

    Args:
        grid: what numbers are measured by.
        levels: (2 ** bits,), ascending, on the grid.
        width: channels of a row.
        dtype: 16-bit type of the stored outliers.
    """

    def __init__(self, grid: Grid, levels: Tensor, width: int, dtype: torch.dtype) -> None:
        self.grid, self.levels, self.width = grid, levels, width
        self.bits = levels.numel().bit_length() - 1
        self.codes, self.scales = GrowingBuffer(), GrowingBuffer()
        self.sparse = SparseRows(width, dtype, BLOCK) if grid.sparse else None

    def reserve(self, tokens: int) -> None:
        self.codes.reserve(tokens)
        self.scales.reserve(tokens)

    def append(self, rows: Tensor) -> None:
        between = (self.levels[1:] + self.levels[:-1]) / 2
        for part in rows.float().split(BLOCK, dim=1):
            measured = self.grid.measure(part)
            codes = torch.bucketize(measured.normalised.contiguous(), between).to(torch.uint8)
            self.codes.append(pack(codes, self.bits))
            if measured.scales is not None:
                self.scales.append(measured.scales)
            if self.sparse is not None:
                assert measured.outliers is not None
                self.sparse.append(part, measured.outliers)

    def trim(self) -> None:
        self.codes.trim()
        self.scales.trim()
        if self.sparse is not None:
            self.sparse.trim()

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        if not len(self):
            return
        packed = self.codes.view()
        batch = packed.shape[0]
        table, symbols = self._table()
        workspace = table.new_empty(batch * min(BLOCK, len(self)) * symbols, table.shape[1])
        for start in range(0, len(self), BLOCK):
            part = packed[:, start : start + BLOCK]
            tokens = part.shape[1]
            names = part if table.shape[1] > 1 else unpack(part, self.bits, self.width)
            out = workspace[: batch * tokens * symbols]
            torch.index_select(table, 0, names.reshape(-1).int(), out=out)
            block = out.view(batch, tokens, -1)[..., : self.width]
            scales = self.scales.view()[:, start : start + tokens] if self.grid.per_token else None
            self.grid.restore(block, scales)
            if self.sparse is not None:
                self.sparse.write(block, start)
            yield start, block

    def _table(self) -> tuple[Tensor, int]:
        """What a stored symbol stands for, (symbols' values, numbers of a symbol), and symbols of a row.

        A whole byte is one symbol where it holds whole codes: one look-up then gives all its numbers.
        """
        if GROUP % self.bits:
            return self.levels[:, None], self.width
        every = torch.arange(256, dtype=torch.uint8, device=self.levels.device)[:, None]
        return self.levels[unpack(every, self.bits, GROUP // self.bits).long()], packed_size(self.width, self.bits)

    def clear(self) -> None:
        self.codes.clear()
        self.scales.clear()
        if self.sparse is not None:
            self.sparse.clear()

    def __len__(self) -> int:
        return len(self.codes)

    def nbytes_by_part(self) -> dict[str, int]:
        sparse = 0 if self.sparse is None else self.sparse.nbytes()
        return {"codes": self.codes.nbytes(), "scales": self.scales.nbytes(), "outliers": sparse}

    def crop(self, tokens: int) -> None:
        if self.sparse is not None and tokens < len(self):
            self.sparse.crop(tokens)
        self.codes.crop(tokens)
        self.scales.crop(tokens)

    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        self.codes.map_batch(select)
        self.scales.map_batch(select)
        if self.sparse is not None:
            self.sparse.map_batch(select)


def coded_nbytes(grid: Grid, bits: int, width: int, tokens: int, outliers: int) -> int:
    """Bytes that `CodedRows` takes for `tokens` tokens with `outliers` outliers in all, without spare capacity."""
    per_token = packed_size(width, bits) + (4 if grid.per_token else 0) + (2 if grid.sparse else 0)
    return tokens * per_token + outliers * (index_dtype(width).itemsize + 2)
