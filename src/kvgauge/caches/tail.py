"""A compressed context with an exact tail: what the caches that join layers have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from kvgauge.caches.attention import Segment, segmented_attention
from kvgauge.caches.base import LayerCache
from kvgauge.caches.buffers import GrowingBuffer
from kvgauge.caches.exact import ExactSegment


class TailedLayer(LayerCache):
    """Tokens after the compression stay exact, behind whatever the subclass makes of the context."""

    def __init__(self) -> None:
        super().__init__()
        self.tail_keys, self.tail_values = GrowingBuffer(), GrowingBuffer()

    @abstractmethod
    def context_segment(self) -> Segment:
        """The compressed tokens."""

    @abstractmethod
    def context_dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values that the compressed tokens stand for, (batch, num_key_value_heads, tokens, head_dim)."""

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.tail_keys.append(keys)
        self.tail_values.append(values)

    def tail_segments(self) -> list[Segment]:
        """The exact tokens: one segment, or none."""
        return [ExactSegment(self.tail_keys.view(), self.tail_values.view())] if len(self.tail_keys) else []

    def attend_compressed(self, query: Tensor, attention_mask: Tensor | None, scaling: float) -> Tensor:
        return segmented_attention(query, [self.context_segment(), *self.tail_segments()], attention_mask, scaling)

    def tail_nbytes(self) -> int:
        return self.tail_keys.nbytes() + self.tail_values.nbytes()

    def compressed_dense(self) -> tuple[Tensor, Tensor]:
        keys, values = self.context_dense()
        if not len(self.tail_keys):
            return keys, values
        return torch.cat([keys, self.tail_keys.view()], dim=2), torch.cat([values, self.tail_values.view()], dim=2)

    def buffers(self) -> Sequence[GrowingBuffer]:
        return (self.tail_keys, self.tail_values)
