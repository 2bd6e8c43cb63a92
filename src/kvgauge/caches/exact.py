"""Uncompressed keys and values: the reference of every comparison."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvgauge.caches.attention import exact_attention
from kvgauge.caches.buffers import GrowingBuffer
from kvgauge.caches.two_phase import TwoPhaseLayer


class ExactSegment:
    """Exact keys and values (batch, num_key_value_heads, tokens, head_dim) as a segment of attention."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.num_key_value_heads = keys.shape[1]

    def __len__(self) -> int:
        return self.keys.shape[2]

    def scores(self, query: Tensor) -> Tensor:
        return query @ self.keys.transpose(-1, -2)

    def mix(self, weights: Tensor) -> Tensor:
        return weights @ self.values


class ExactLayer(TwoPhaseLayer):
    """Keeps everything; ``compress`` only gives back spare capacity.

    Args:
        reserve: tokens to hold room for from the start: the preallocated baseline of latency measurements.
    """

    def __init__(self, reserve: int = 0) -> None:
        super().__init__()
        self.keys_buffer, self.values_buffer = GrowingBuffer(), GrowingBuffer()
        self.reserved = reserve
        self.exact_keys.reserve(reserve)
        self.exact_values.reserve(reserve)

    def store(self, keys: Tensor, values: Tensor) -> None:
        for buffer, rows in ((self.keys_buffer, keys), (self.values_buffer, values)):
            if self.reserved > rows.shape[-2]:
                buffer.reserve(self.reserved)
                buffer.append(rows)
            else:
                buffer.set(rows)

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.keys_buffer.append(keys)
        self.values_buffer.append(values)

    def attend_compressed(self, query: Tensor, attention_mask: Tensor | None, scaling: float) -> Tensor:
        return exact_attention(query, self.keys_buffer.view(), self.values_buffer.view(), attention_mask, scaling)

    def compressed_nbytes_by_part(self) -> dict[str, int]:
        return {"keys": self.keys_buffer.nbytes(), "values": self.values_buffer.nbytes()}

    def compressed_dense(self) -> tuple[Tensor, Tensor]:
        return self.keys_buffer.view(), self.values_buffer.view()

    def buffers(self) -> Sequence[GrowingBuffer]:
        return (self.keys_buffer, self.values_buffer)

    def reversible_tokens(self) -> int:
        return min(buffer.room() for buffer in self.buffers())

    def crop_compressed(self, tokens: int) -> None:
        self.keys_buffer.crop(tokens)
        self.values_buffer.crop(tokens)
