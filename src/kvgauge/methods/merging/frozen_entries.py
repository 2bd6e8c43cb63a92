"""Merged entries that merge no more: handed over to a layer that projects or quantises them.

The entries stand at their positions, rotated, as tokens of an ordinary cache do; what tells them apart is their
cardinality c, whose logarithm is added to the scores. Tokens that come later are appended with c = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvgauge.attend.mask import Mask
from kvgauge.layers.cache import KVCache
from kvgauge.layers.two_phase import TwoPhaseLayer
from kvgauge.methods.merging.layer_entries import LayerEntries
from kvgauge.methods.merging.positions import NewTokens
from kvgauge.store.buffers import GrowingBuffer
from kvgauge.store.rows import RowBuffer
from kvgauge.store.steps import Steps


class FrozenEntries(LayerEntries):
    """The entries of one layer after the context.

    Args:
        layer: empty; takes them over.
        keys, values: (batch, num_key_value_heads, entries, head_dim); values are means.
        cardinalities: (batch, entries), 0 where a shorter row has no entry; None while all are 1.
    """

    def __init__(self, layer: TwoPhaseLayer, keys: Tensor, values: Tensor, cardinalities: Tensor | None) -> None:
        self.layer = layer
        self.cardinalities = GrowingBuffer()  # (batch, entries, 1), empty while all are 1
        rows = KVCache([layer])  # of its own: which entries a row has differs from layer to layer
        if cardinalities is not None:
            self.cardinalities.set(cardinalities[..., None])
            there = cardinalities > 0
            rows.valid = None if bool(there.all()) else there
        layer.lazy_initialization(keys, values)
        layer.logical_length = keys.shape[2]
        layer.store(keys, values)
        layer.compressed = True

    def __len__(self) -> int:
        return self.layer.logical_length

    # -- a forward pass ------------------------------------------------------------------------------------------

    def look_ahead(self, query: Tensor, keys: Tensor, new: NewTokens, scaling: float) -> None:
        """Nothing merges."""

    def window_end(self, begin: int, queries: int, valid: Tensor | None) -> int:
        return queries

    def append(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
        batch, before, new = keys.shape[0], len(self), keys.shape[2]
        if valid is not None or len(self.cardinalities):
            ones = torch.ones(batch, before + new, 1, dtype=torch.int32, device=keys.device)
            if not len(self.cardinalities):
                self.cardinalities.append(ones[:, :before])
            self.cardinalities.append(ones[:, before:] if valid is None else valid.int()[..., None])
        self.layer.came(new)
        self.layer.append(keys, values)

    def attend(self, query: Tensor, scaling: float, valid: Tensor | None = None) -> Tensor:
        cardinalities = self.cardinalities.view().squeeze(-1) if len(self.cardinalities) else None
        return self.layer.attend_compressed(query, Mask.of_entries(cardinalities, query.shape[2], query.dtype), scaling)

    def end_windows(self) -> None:
        """There are none."""

    def merges_ahead(self) -> bool:
        return False

    def completed(self, successor: Callable[[], TwoPhaseLayer] | None) -> LayerEntries:
        return self

    # -- steps of one shape --------------------------------------------------------------------------------------

    def fix_shapes(self, steps: Steps) -> None:
        if not len(self.cardinalities):
            keys = self.layer.buffers()[0].dense()
            self.cardinalities.append(keys.new_ones(keys.shape[0], len(self), 1, dtype=torch.int32))
        self.layer.fix_shapes(steps)
        self.cardinalities.fix(steps)

    def release_shapes(self, steps: Steps) -> None:
        self.layer.release_shapes()
        self.cardinalities.release(steps)

    # -- what the layer is asked ---------------------------------------------------------------------------------

    def attend_entries(self, query: Tensor, scaling: float) -> Tensor:
        return self.attend(query, scaling)

    @property
    def single_tokens(self) -> bool:
        return not len(self.cardinalities)

    def dense(self) -> tuple[Tensor, Tensor]:
        return self.layer.dense()

    def nbytes_by_part(self) -> dict[str, int]:
        size = self.cardinalities.nbytes()
        return self.layer.compressed_nbytes_by_part() | ({"cardinalities": size} if size else {})

    def fixed_nbytes(self) -> int:
        return self.layer.fixed_nbytes()

    def buffers(self) -> Sequence[RowBuffer]:
        return (self.cardinalities, *self.layer.buffers())

    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        self.cardinalities.map_batch(select)
        self.layer.map_batch(select)
