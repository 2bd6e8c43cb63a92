"""Layers that are two buffers with a row for every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from kvgauge.layers.two_phase import TwoPhaseLayer
from kvgauge.store.buffers import GrowingBuffer
from kvgauge.store.rows import RowBuffer


class PairLayer(TwoPhaseLayer):
    """What stands in the place of the keys in one buffer, and of the values in the other.

    Args:
        keys, values: empty buffers.

    Attributes:
        parts: what the two are called where bytes are counted.
    """

    parts: ClassVar[tuple[str, str]] = ("keys", "values")

    def __init__(self, keys: RowBuffer, values: RowBuffer) -> None:
        super().__init__()
        self.keys_buffer, self.values_buffer = keys, values

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.keys_buffer.append(keys)
        self.values_buffer.append(values)

    def compressed_nbytes_by_part(self) -> dict[str, int]:
        return {part: buffer.nbytes() for part, buffer in zip(self.parts, self.buffers(), strict=True)}

    def compressed_dense(self) -> tuple[Tensor, Tensor]:
        return self.keys_buffer.dense(), self.values_buffer.dense()

    def buffers(self) -> Sequence[RowBuffer]:
        return (self.keys_buffer, self.values_buffer)

    def growing(self) -> Sequence[RowBuffer]:
        return self.buffers()

    def compress_again(self) -> None:
        for buffer in self.buffers():
            buffer.trim()

    def reversible_tokens(self) -> int:
        return min(buffer.room() for buffer in self.buffers())

    def crop_compressed(self, tokens: int) -> None:
        for buffer in self.buffers():
            buffer.crop(tokens)


class PreallocatedLayer(PairLayer):
    """Keeps everything; ``compress`` only gives back spare capacity.

    Args:
        reserve: tokens to hold room for from the start: the preallocated baseline of latency measurements.
        dimension_major: of both buffers, see `GrowingBuffer`.
    """

    def __init__(self, reserve: int = 0, *, dimension_major: bool = False) -> None:
        super().__init__(GrowingBuffer(dimension_major=dimension_major), GrowingBuffer(dimension_major=dimension_major))
        self.reserved = reserve
        self.exact_keys.reserve(reserve)
        self.exact_values.reserve(reserve)

    def store(self, keys: Tensor, values: Tensor) -> None:
        for buffer, rows in zip(self.buffers(), (keys, values), strict=True):
            if self.reserved > rows.shape[-2]:
                buffer.reserve(self.reserved)
                buffer.append(rows)
            else:
                buffer.set(rows)

    def compress_again(self) -> None:
        if not self.reserved:
            super().compress_again()
