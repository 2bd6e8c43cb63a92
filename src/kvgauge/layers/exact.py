"""Uncompressed keys and values: the reference of every comparison."""

from __future__ import annotations

from torch import Tensor

from kvgauge.attend.attention import exact_attention
from kvgauge.attend.mask import Mask
from kvgauge.layers.pair import PreallocatedLayer


class ExactLayer(PreallocatedLayer):
    """Every key and value, as the model made them."""

    def attend_compressed(self, query: Tensor, mask: Mask, scaling: float) -> Tensor:
        return exact_attention(query, self.keys_buffer.dense(), self.values_buffer.dense(), mask, scaling)
