"""Codes of most tokens, and the most recent ones in 16 bits (KIVI, arXiv 2402.02750)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvgauge.errors import UserError
from kvgauge.kernels.cpu.stored_rows import StoredRows
from kvgauge.store.half_rows import HalfRows
from kvgauge.store.quantized_rows import QuantizedRows
from kvgauge.store.rows import BlockwiseRows


class WindowedRows(BlockwiseRows):
    """The last tokens as they are, and all others in codes; tokens leave the window a group at a time.

    Args:
        coded: an empty buffer for what leaves the window.
        window: tokens that stay in 16 bits at least.
        group: tokens that leave together.
    """

    def __init__(self, coded: QuantizedRows, window: int, group: int) -> None:
        self.coded, self.window, self.group = coded, window, group
        self.recent = HalfRows()
        self.dtype = torch.float32

    def set(self, rows: Tensor, valid: Tensor | None = None) -> None:
        self.dtype = rows.dtype
        split = max(0, rows.shape[-2] - self.window)
        self.coded.set(rows[..., :split, :], None if valid is None else valid[:, :split])
        self.recent.set(rows[..., split:, :])

    def take(self, stored: Tensor, valid: Tensor | None = None) -> None:
        self.set(stored.mT if self.coded.dimension_major else stored, valid)

    def append(self, rows: Tensor) -> None:
        self.dtype = rows.dtype
        self.recent.append(rows)
        surplus = (len(self.recent) - self.window) // self.group * self.group
        if surplus > 0:
            self.coded.append(self.recent.drop_front(surplus))

    def reserve(self, tokens: int) -> None:
        self.coded.reserve(max(0, tokens - self.window))

    def trim(self) -> None:
        self.coded.trim()
        self.recent.trim()

    def crop(self, tokens: int) -> None:
        if tokens < len(self.coded):
            raise UserError(
                f"cannot crop into tokens that have left the window of {self.window} exact tokens: start a new cache"
            )
        self.recent.crop(tokens - len(self.coded))

    def room(self) -> int:
        left = self.window + self.group - 1 - len(self.recent)
        return max(0, min(self.recent.room(), left))

    @property
    def together(self) -> int:
        return self.group

    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        self.coded.map_batch(select)
        self.recent.map_batch(select)

    def clear(self) -> None:
        self.coded.clear()
        self.recent.clear()

    def __len__(self) -> int:
        return len(self.coded) + len(self.recent)

    def nbytes(self) -> int:
        return self.coded.nbytes() + self.recent.nbytes()

    @property
    def device(self) -> torch.device:
        return self.recent.device

    def shape(self) -> tuple[int, ...]:
        *outer, _, dimension = self.recent.shape()
        return (*outer, len(self), dimension)

    def compiled(self, shared: int = 0) -> list[StoredRows] | None:
        pieces = []
        for part in (self.coded, self.recent):
            own = part.compiled() if len(part) else []
            if own is None:
                return None
            pieces += own
        return pieces

    def write(self, start: int, stop: int, out: Tensor) -> None:
        coded = len(self.coded)
        if start < coded:
            end = min(stop, coded)
            out[..., : end - start, :] = self.coded.block(start, end)
        if stop > coded:
            behind = max(start, coded)
            self.recent.write(behind - coded, stop - coded, out[..., behind - start :, :])
