"""Rows that are rotated before they are quantised: their channels are then alike, whatever they were before."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvgauge.kernels.cpu.stored_rows import StoredRows
from kvgauge.store.quantized_rows import QuantizedRows
from kvgauge.store.rotations import rotation
from kvgauge.store.rows import RowBuffer
from kvgauge.store.windowed_rows import WindowedRows


class RotatedRows(RowBuffer):
    """A buffer behind a fixed rotation R: it keeps ``rows @ R``, is asked with ``query @ R``, and sums turn back.

    Args:
        inner: an empty buffer.
        kind, seed: of the rotation.
    """

    def __init__(self, inner: QuantizedRows | WindowedRows, kind: str, seed: int = 0) -> None:
        self.inner, self.kind, self.seed = inner, kind, seed

    def _turned(self, rows: Tensor) -> Tensor:
        return (rows.float() @ self._rotation(rows.shape[-1], rows.device)).to(rows.dtype)

    def _back(self, rows: Tensor) -> Tensor:
        return (rows.float() @ self._rotation(rows.shape[-1], rows.device).T).to(rows.dtype)

    def _rotation(self, dimension: int, device: torch.device) -> Tensor:
        return rotation(self.kind, dimension, self.seed).to(device)

    def append(self, rows: Tensor) -> None:
        self.inner.append(self._turned(rows))

    def set(self, rows: Tensor, valid: Tensor | None = None) -> None:
        self.inner.set(self._turned(rows), valid)

    def take(self, stored: Tensor, valid: Tensor | None = None) -> None:
        coded = self.inner.coded if isinstance(self.inner, WindowedRows) else self.inner
        self.set(stored.mT if coded.dimension_major else stored, valid)

    def reserve(self, tokens: int) -> None:
        self.inner.reserve(tokens)

    def trim(self) -> None:
        self.inner.trim()

    def crop(self, tokens: int) -> None:
        self.inner.crop(tokens)

    def room(self) -> int:
        return self.inner.room()

    @property
    def together(self) -> int:
        return self.inner.together

    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        self.inner.map_batch(select)

    def clear(self) -> None:
        self.inner.clear()

    def __len__(self) -> int:
        return len(self.inner)

    def nbytes(self) -> int:
        return self.inner.nbytes()

    def compiled(self, shared: int = 0) -> list[StoredRows] | None:
        pieces = self.inner.compiled()
        if pieces is None or shared:
            return None
        matrix = rotation(self.kind, self.inner.shape()[-1], self.seed)
        return [piece.turned(matrix) for piece in pieces]

    def block(self, start: int, stop: int) -> Tensor:
        return self._back(self.inner.block(start, stop))

    def dot(self, query: Tensor) -> Tensor:
        return self.inner.dot(self._turned(query))

    def mix(self, weights: Tensor) -> Tensor:
        return self._back(self.inner.mix(weights))
