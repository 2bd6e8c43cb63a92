"""The first tokens of every sequence, exact, in front of whatever the others become."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvgauge.caches.attention import causal_mask
from kvgauge.caches.storage import EXACT, Storage
from kvgauge.caches.storage_layer import StoredSegment


class ExactSinks:
    """Attention sinks: `limit` first tokens, at most all but one of the context.

    Without padding they are cut off the context. In a padded batch every row's sinks are its own first tokens behind
    its padding: they are gathered, the others keep their columns, and the mask hides the sinks' columns there.
    """

    def __init__(self, limit: int, storage: Storage = EXACT) -> None:
        self.limit = limit
        self.keys, self.values = storage.kept(step=1), storage.kept(step=1)
        self.num_heads = 0  # kv-heads, known with the first tokens
        self.columns: Tensor | None = None  # (batch, sinks): where they stand, if rows are padded

    def take(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Copy the sinks of a context (batch, heads, tokens, head_dim); what is left of keys, values and `valid`."""
        self.columns, self.num_heads = None, keys.shape[1]
        count = min(self.limit, keys.shape[2] - 1)
        if count < 1:
            return keys, values, valid
        if valid is None:
            self.keys.set(keys[:, :, :count])
            self.values.set(values[:, :, :count])
            return keys[:, :, count:], values[:, :, count:], None
        valid = valid[:, : keys.shape[2]]
        lengths = valid.sum(dim=1, keepdim=True)
        columns = keys.shape[2] - lengths + torch.arange(count, device=keys.device)
        # A row too short for all its sinks fills up with its first column, which is padding there and never seen.
        self.columns = torch.where(torch.arange(count, device=keys.device) < lengths - 1, columns, 0)
        index = self.columns[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        self.keys.set(keys.gather(2, index))
        self.values.set(values.gather(2, index))
        return keys, values, valid.scatter(1, self.columns, False)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def cut(self) -> int:
        """Tokens that stand in front of the context's columns: 0 where the columns were gathered."""
        return 0 if self.columns is not None else len(self.keys)

    def segments(self) -> list[StoredSegment]:
        """The sinks as a segment of attention, or none."""
        return [StoredSegment(self.keys, self.values, self.num_heads)] if len(self.keys) else []

    def mask(self, mask: Tensor | None, queries: int, length: int) -> Tensor | None:
        """A mask (batch, 1, queries, logical length) in the order of the segments: sinks first."""
        if self.columns is None:
            return mask
        if mask is None:
            mask = causal_mask(queries, length, self.columns.device)
        mask = mask.expand(self.columns.shape[0], 1, queries, -1)
        columns = self.columns[:, None, None, :].expand(-1, 1, queries, -1)
        return torch.cat([mask.gather(3, columns), mask.scatter(3, columns, False)], dim=3)

    def restored(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the other tokens with the sinks back in their places."""
        if not len(self.keys):
            return keys, values
        own_keys, own_values = self.keys.dense(), self.values.dense()
        if self.columns is None:
            return torch.cat([own_keys, keys], dim=2), torch.cat([own_values, values], dim=2)
        index = self.columns[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        return keys.scatter(2, index, own_keys), values.scatter(2, index, own_values)

    def nbytes(self) -> int:
        return self.keys.nbytes() + self.values.nbytes()

    def map_columns(self, select: Callable[[Tensor], Tensor]) -> None:
        """Apply a selection along the batch to what is not a buffer."""
        if self.columns is not None:
            self.columns = select(self.columns)
