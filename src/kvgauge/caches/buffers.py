"""Tensors that grow along tokens without copying the whole cache at every token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

GROWTH_STEP = 64  # tokens: a copy every 64 tokens costs 1/64 of one read of the cache a token


class GrowingBuffer:
    """Rows along the second-to-last dimension, e.g. (batch, heads, tokens, dimension), in storage with spare capacity.

    Args:
        step: tokens of capacity added when the storage is full.
    """

    def __init__(self, step: int = GROWTH_STEP) -> None:
        self.step = step
        self.length = 0
        self._storage: Tensor | None = None

    def append(self, rows: Tensor) -> None:
        """Add rows (…, new tokens, dimension)."""
        new = rows.shape[-2]
        if self._storage is None:
            self._storage = rows.new_empty(*rows.shape[:-2], max(new, self.step), rows.shape[-1])
        elif self.length + new > self._storage.shape[-2]:
            self._resize(self.length + max(new, self.step))
        self._storage[..., self.length : self.length + new, :] = rows
        self.length += new

    def set(self, rows: Tensor) -> None:
        """Replace the content by `rows`, with no spare capacity and no storage shared with anything larger."""
        self._storage = rows.contiguous() if rows._base is None else rows.clone(memory_format=torch.contiguous_format)
        self.length = rows.shape[-2]

    def share(self, rows: Tensor) -> None:
        """Hold `rows` without copying them; an append copies first."""
        self._storage, self.length = rows, rows.shape[-2]

    def reserve(self, tokens: int) -> None:
        """Capacity for `tokens` tokens in all, at the next append at the latest."""
        if self._storage is None:
            self.step = max(self.step, tokens)
        elif tokens > self._storage.shape[-2]:
            self._resize(tokens)

    def view(self) -> Tensor:
        """The rows, as a view (…, length, dimension).

        Raises:
            RuntimeError: nothing was ever appended.
        """
        if self._storage is None:
            raise RuntimeError("the buffer is empty: append before reading")
        return self._storage[..., : self.length, :]

    def __len__(self) -> int:
        return self.length

    def nbytes(self) -> int:
        """Bytes of the live storage, spare capacity included."""
        return 0 if self._storage is None else self._storage.untyped_storage().nbytes()

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens` rows."""
        self.length = min(self.length, tokens)

    def drop_front(self, tokens: int) -> Tensor:
        """Remove the first `tokens` rows and return a copy of them."""
        gone = self.view()[..., :tokens, :].clone()
        kept = self.view()[..., tokens:, :].clone()
        assert self._storage is not None
        self._storage[..., : kept.shape[-2], :] = kept
        self.length -= tokens
        return gone

    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        """Apply `select` to the storage: reorder, repeat or pick sequences of the batch."""
        if self._storage is not None:
            self._storage = select(self._storage)

    def clear(self) -> None:
        """Free the storage."""
        self._storage, self.length = None, 0

    def _resize(self, capacity: int) -> None:
        assert self._storage is not None
        grown = self._storage.new_empty(*self._storage.shape[:-2], capacity, self._storage.shape[-1])
        grown[..., : self.length, :] = self._storage[..., : self.length, :]
        self._storage = grown
