"""Uncompressed keys and values: the reference of every comparison."""

from __future__ import annotations

from torch import Tensor

from kvgauge.attend.attention import exact_attention
from kvgauge.attend.mask import Mask
from kvgauge.layers.pair import PreallocatedLayer


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


class ExactLayer(PreallocatedLayer):
    """Every key and value, as the model made them."""

    def attend_compressed(self, query: Tensor, mask: Mask, scaling: float) -> Tensor:
        return exact_attention(query, self.keys_buffer.dense(), self.values_buffer.dense(), mask, scaling)
