"""Keys and values of all tokens in whatever form a `Storage` keeps them."""

from __future__ import annotations

import torch
from torch import Tensor

from kvgauge.attend.attention import StoredTokens, segmented_attention
from kvgauge.attend.mask import Mask
from kvgauge.kernels.cpu.stored_attention import StoredRun
from kvgauge.layers.exact import ExactLayer
from kvgauge.layers.pair import PairLayer
from kvgauge.layers.two_phase import TwoPhaseLayer
from kvgauge.store.rows import RowBuffer
from kvgauge.store.storage import EXACT, Storage


class StoredSegment(StoredTokens):
    """Keys and values (batch, num_key_value_heads, tokens, head_dim) of two buffers as a segment of attention."""

    def __init__(self, keys: RowBuffer, values: RowBuffer, num_key_value_heads: int) -> None:
        self.keys, self.values = keys, values
        self.num_key_value_heads = num_key_value_heads

    def __len__(self) -> int:
        return len(self.keys)

    def scores(self, query: Tensor) -> Tensor:
        """See `kvgauge.attend.attention.Segment`."""
        return self.keys.dot(query)

    def mix(self, weights: Tensor) -> Tensor:
        """See `kvgauge.attend.attention.Segment`."""
        return self.values.mix(weights)

    def stored_run(self) -> StoredRun | None:
        """See `kvgauge.attend.attention.StoredTokens`."""
        keys, values = self.keys.compiled(), self.values.compiled()
        return None if keys is None or values is None else StoredRun(keys, values)


class StoredLayer(PairLayer):
    """Every token of one layer in a storage. By default keys are quantised per channel and values per token (KIVI).

    Args:
        storage: of keys and values.
    """

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage.rows("channel", part="keys"), storage.rows("token"))
        self.num_heads = 0  # kv-heads, known with the first tokens

    def store(self, keys: Tensor, values: Tensor) -> None:
        self.num_heads = keys.shape[1]
        self.keys_buffer.set(keys, self.valid)
        self.values_buffer.set(values, self.valid)

    def attend_compressed(self, query: Tensor, mask: Mask, scaling: float) -> Tensor:
        segment = StoredSegment(self.keys_buffer, self.values_buffer, self.num_heads)
        return segmented_attention(query, [segment], mask, scaling)


def whole_layer(storage: Storage) -> TwoPhaseLayer:
    """A layer of which nothing but the form of its numbers is compressed."""
    return ExactLayer() if storage is EXACT else StoredLayer(storage)


def whole_nbytes(storage: Storage, heads: int, head_dim: int, dtype: torch.dtype, tokens: int) -> int:
    """Bytes of one sequence in a `whole_layer`, right after its compression."""
    keys = storage.rows_nbytes(tokens, head_dim, dtype, "channel", part="keys")
    return heads * (keys + storage.rows_nbytes(tokens, head_dim, dtype, "token"))
