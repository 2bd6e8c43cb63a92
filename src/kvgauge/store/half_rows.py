"""Rows kept in 16 bits: what stays unquantised beside packed codes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvgauge.kernels.cpu.stored_rows import StoredRows
from kvgauge.store.buffers import GROWTH_STEP, GrowingBuffer
from kvgauge.store.rows import BlockwiseRows
from kvgauge.store.steps import Steps


def half_of(dtype: torch.dtype) -> torch.dtype:
    """The 16-bit dtype that keeps rows of `dtype`: itself, or float16, which is finer than bfloat16 within its range.

    Keys, values and latents are far below 65,504, the largest float16.
    """
    return dtype if dtype.itemsize == 2 else torch.float16


class HalfRows(BlockwiseRows):
    """Rows in 16 bits; products are made in the dtype of the queries, block by block.

    Args:
        step: tokens of capacity added when the storage is full.
    """

    def __init__(self, step: int = GROWTH_STEP) -> None:
        self.stored = GrowingBuffer(step)
        self.dtype = torch.float16

    def append(self, rows: Tensor) -> None:
        self.dtype = rows.dtype
        self.stored.append(rows.to(half_of(rows.dtype)))

    def set(self, rows: Tensor, valid: Tensor | None = None) -> None:
        self.dtype = rows.dtype
        self.stored.set(rows.to(half_of(rows.dtype)))

    def take(self, stored: Tensor, valid: Tensor | None = None) -> None:
        self.set(stored, valid)

    def compiled(self, shared: int = 0) -> list[StoredRows] | None:
        return self.stored.compiled(shared)

    def drop_front(self, tokens: int) -> Tensor:
        return self.stored.drop_front(tokens).to(self.dtype)

    def reserve(self, tokens: int) -> None:
        self.stored.reserve(tokens)

    def fix(self, steps: Steps) -> None:
        self.stored.fix(steps)

    def release(self, steps: Steps) -> None:
        self.stored.release(steps)

    def trim(self) -> None:
        self.stored.trim()

    def crop(self, tokens: int) -> None:
        self.stored.crop(tokens)

    def room(self) -> int:
        return self.stored.room()

    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        self.stored.map_batch(select)

    def clear(self) -> None:
        self.stored.clear()

    def __len__(self) -> int:
        return len(self.stored)

    def nbytes(self) -> int:
        return self.stored.nbytes()

    @property
    def device(self) -> torch.device:
        return self.stored.view().device

    def shape(self) -> tuple[int, ...]:
        return tuple(self.stored.view().shape)

    def write(self, start: int, stop: int, out: Tensor) -> None:
        out.copy_(self.stored.view()[..., start:stop, :])
