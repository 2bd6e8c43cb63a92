"""A compressed context with an exact tail: what the caches that join layers have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvgauge.attend.attention import Segment, segmented_attention
from kvgauge.attend.mask import Mask
from kvgauge.layers.stored import StoredSegment
from kvgauge.layers.two_phase import TwoPhaseLayer
from kvgauge.store.rows import RowBuffer
from kvgauge.store.steps import Steps
from kvgauge.store.storage import EXACT, Storage


class TailedLayer(TwoPhaseLayer):
    """Tokens after the compression stay exact, behind whatever the subclass makes of the context.

    Args:
        storage: of the tail.
    """

    def __init__(self, storage: Storage = EXACT) -> None:
        super().__init__()
        self.tail_keys, self.tail_values = storage.kept(), storage.kept()
        self.tail_heads = 0  # kv-heads, known with the first tokens
        self._none: list[Tensor] = []  # no keys and no values, (batch, kv-heads, 0, head_dim)

    @abstractmethod
    def context_segment(self) -> Segment:
        """The compressed tokens."""

    @abstractmethod
    def context_dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values that the compressed tokens stand for, (batch, num_key_value_heads, tokens, head_dim)."""

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.tail_heads = keys.shape[1]
        self.tail_keys.append(keys)
        self.tail_values.append(values)

    def growing(self) -> Sequence[RowBuffer] | None:
        return (self.tail_keys, self.tail_values)

    def fix_shapes(self, steps: Steps) -> None:
        if not len(self.tail_keys):
            self.append(*self._none)
        super().fix_shapes(steps)

    def compress(self) -> None:
        if not self.compressed and self.is_initialized:
            exact = (self.exact_keys.view(), self.exact_values.view())
            self._none = [rows.new_empty(*rows.shape[:2], 0, rows.shape[3], device=self.home) for rows in exact]
        super().compress()

    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        super().map_batch(select)
        self._none = [select(rows) for rows in self._none]

    def tail_segments(self) -> list[Segment]:
        """The exact tokens: one segment, or none."""
        return [StoredSegment(self.tail_keys, self.tail_values, self.tail_heads)] if len(self.tail_keys) else []

    def attend_compressed(self, query: Tensor, mask: Mask, scaling: float) -> Tensor:
        return segmented_attention(query, [self.context_segment(), *self.tail_segments()], mask, scaling)

    def reversible_tokens(self) -> int:
        return min(self.tail_keys.room(), self.tail_values.room())

    def tail_nbytes(self) -> int:
        return self.tail_keys.nbytes() + self.tail_values.nbytes()

    def compressed_dense(self) -> tuple[Tensor, Tensor]:
        keys, values = self.context_dense()
        if not len(self.tail_keys):
            return keys, values
        return torch.cat([keys, self.tail_keys.dense()], dim=2), torch.cat([values, self.tail_values.dense()], dim=2)

    def buffers(self) -> Sequence[RowBuffer]:
        return (self.tail_keys, self.tail_values)
