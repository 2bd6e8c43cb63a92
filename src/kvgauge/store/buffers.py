"""Tensors that grow along tokens without copying the whole cache at every token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvgauge.kernels.cpu.stored_rows import StoredRows, plain_rows
from kvgauge.store.rows import RowBuffer
from kvgauge.store.steps import Steps

GROWTH_STEP = 64  # tokens: a copy every 64 tokens costs 1/64 of one read of the cache a token


class GrowingBuffer(RowBuffer):
    """Rows along the second-to-last dimension, e.g. (batch, heads, tokens, dimension), in storage with spare capacity.

    Args:
        step: tokens of capacity added when the storage is full.
        dimension_major: keep the tokens of one dimension side by side in memory, instead of the dimensions of one
            token. What goes in and comes out has the same shapes. Products of a few queries with many tokens then run
            along contiguous tokens: on a CPU they come much closer to the memory's bandwidth. Kernels of other devices
            read one token after another: there the rows stand as they come.
    """

    def __init__(self, step: int = GROWTH_STEP, *, dimension_major: bool = False) -> None:
        self.step = step
        self.dimension_major = dimension_major
        self.length = 0
        self._reserved = 0  # tokens of capacity of the first allocation
        self._storage: Tensor | None = None  # (…, capacity, dimension), the last two swapped if dimension_major
        self._fixed: tuple[int, Tensor] | None = None  # rows before the shape was fixed, and the count of those since

    def append(self, rows: Tensor) -> None:
        """Add rows (…, new tokens, dimension); one, where the shape is fixed."""
        if self._fixed is not None:
            start, taken = self._fixed
            self.view().index_copy_(-2, taken + start, rows)
            return
        new = rows.shape[-2]
        if self._storage is None:
            self._suit(rows)
            self._storage = self._empty(rows, max(new, self.step, self._reserved))
        elif self.length + new > self._capacity:
            self._resize(self.length + max(new, self.step))
        self._slots(self.length, self.length + new).copy_(rows)
        self.length += new

    def set(self, rows: Tensor, valid: Tensor | None = None) -> None:
        self._suit(rows)
        if rows._base is None and not self.dimension_major:
            self._storage = rows.contiguous()
        else:
            self._storage = self._swapped(rows).clone(memory_format=torch.contiguous_format)
        self.length = rows.shape[-2]

    def take(self, stored: Tensor, valid: Tensor | None = None) -> None:
        """Replace the content by a tensor in the layout of the storage, which the caller gives up: nothing is copied.

        Args:
            stored: contiguous, (…, tokens, dimension), or (…, dimension, tokens) if dimension_major.
            valid: exact rows learn nothing from others: unused.
        """
        self._storage = stored
        self.length = stored.shape[-1 if self.dimension_major else -2]

    def share(self, rows: Tensor) -> None:
        """Hold `rows` without copying them; an append copies first."""
        self._suit(rows)
        self._storage, self.length = self._swapped(rows), rows.shape[-2]

    def reserve(self, tokens: int) -> None:
        """Capacity for `tokens` tokens in all, at the next append at the latest."""
        self._reserved = tokens
        if self._storage is None:
            return
        if tokens > self._capacity:
            self._resize(tokens)

    def fix(self, steps: Steps) -> None:
        if self._storage is None:
            raise RuntimeError("the buffer is empty: append before its shape is fixed")
        start = self.length
        self._resize(start + steps.room)
        self.length = start + steps.room
        self._slots(start, self.length).zero_()
        torch._dynamo.mark_static_address(self._storage)
        self._fixed = start, steps.on(self._storage.device)

    def release(self, steps: Steps) -> None:
        assert self._fixed is not None
        self.length, self._fixed = self._fixed[0] + steps.count(), None

    def view(self) -> Tensor:
        """The rows, as a view (…, length, dimension).

        Raises:
            RuntimeError: nothing was ever appended.
        """
        if self._storage is None:
            raise RuntimeError("the buffer is empty: append before reading")
        return self._slots(0, self.length)

    def block(self, start: int, stop: int) -> Tensor:
        return self.view()[..., start:stop, :]

    def dot(self, query: Tensor) -> Tensor:
        return query @ self.view().mT

    def mix(self, weights: Tensor) -> Tensor:
        return weights @ self.view()

    def compiled(self, shared: int = 0) -> list[StoredRows] | None:
        if self.dimension_major:
            return None
        rows = self.view()
        plain = plain_rows(rows if rows.dim() == 4 else rows.unsqueeze(1), shared=shared)
        return None if plain is None else [plain]

    def __len__(self) -> int:
        return self.length

    def nbytes(self) -> int:
        """Bytes of the live storage, spare capacity included."""
        return 0 if self._storage is None else self._storage.untyped_storage().nbytes()

    def trim(self) -> None:
        """Give back spare capacity."""
        if self._storage is not None and self._capacity > self.length:
            self._resize(self.length)

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens` rows."""
        self.length = min(self.length, tokens)

    def room(self) -> int:
        return 0 if self._storage is None else self._capacity - self.length

    def drop_front(self, tokens: int) -> Tensor:
        """Remove the first `tokens` rows and return a copy of them."""
        gone = self.view()[..., :tokens, :].clone()
        kept = self.view()[..., tokens:, :].clone()
        self._slots(0, kept.shape[-2]).copy_(kept)
        self.length -= tokens
        return gone

    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        """Apply `select` to the storage: reorder, repeat or pick sequences of the batch."""
        if self._storage is not None:
            self._storage = select(self._storage)

    def clear(self) -> None:
        """Free the storage."""
        self._storage, self.length, self._fixed = None, 0, None

    @property
    def _capacity(self) -> int:
        assert self._storage is not None
        return self._storage.shape[-1 if self.dimension_major else -2]

    def _slots(self, start: int, stop: int) -> Tensor:
        """The rows from `start` to `stop`, written or not, as a view (…, stop − start, dimension)."""
        assert self._storage is not None
        if self.dimension_major:
            return self._storage[..., start:stop].mT
        return self._storage[..., start:stop, :]

    def _suit(self, rows: Tensor) -> None:
        """The layout for the device of the first rows."""
        self.dimension_major = self.dimension_major and rows.device.type == "cpu"

    def _swapped(self, rows: Tensor) -> Tensor:
        """Rows in the layout of the storage, and back."""
        return rows.mT if self.dimension_major else rows

    def _empty(self, rows: Tensor, capacity: int) -> Tensor:
        *outer, _, dimension = rows.shape
        return rows.new_empty(*outer, *((dimension, capacity) if self.dimension_major else (capacity, dimension)))

    def _resize(self, capacity: int) -> None:
        kept = self.view()
        self._storage = self._empty(kept, capacity)
        self._slots(0, self.length).copy_(kept)
