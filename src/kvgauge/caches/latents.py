"""Per-head latents: r numbers instead of head_dim for every key and value, and attention in r dimensions.

With a pair (A, B) per kv-head, keys are stored as ``K̃ = K A`` and asked by ``q B``; with (A_v, B_v) values are stored
as ``Ṽ = V A_v`` and the weighted sum is expanded once, ``(p Ṽ) B_vᵀ``. Keys and values are never rebuilt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvgauge.caches.attention import Segment, causal_mask, hide, segmented_attention
from kvgauge.caches.base import LayerCache
from kvgauge.caches.buffers import GROWTH_STEP
from kvgauge.caches.rows import RowBuffer
from kvgauge.caches.storage import EXACT, Storage
from kvgauge.caches.storage_layer import StoredSegment
from kvgauge.errors import UserError


@dataclass(frozen=True)
class HeadProjections:
    """The pairs of one layer, each (num_key_value_heads, head_dim, rank), in the model's dtype.

    Attributes:
        A, B: keys are stored as K A, queries ask with q B.
        A_v, B_v: values are stored as V A_v, sums are expanded by B_vᵀ.
    """

    A: Tensor
    B: Tensor
    A_v: Tensor
    B_v: Tensor

    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.A, self.B, self.A_v, self.B_v))


# Channels of latents differ in size and offset by far more than tokens do: a grid within a token suits none of
# them, and balancing them costs the first channels, which matter most.
SUITED = "channel"

LayerProjections = Callable[[int], HeadProjections]  # context length → the pairs of one layer


class LatentSegment:
    """Latents (batch, num_key_value_heads, tokens, rank) as a segment of attention."""

    def __init__(self, keys: RowBuffer, values: RowBuffer, projections: HeadProjections) -> None:
        self.keys, self.values, self.projections = keys, values, projections
        self.num_key_value_heads = projections.A.shape[0]

    def __len__(self) -> int:
        return len(self.keys)

    def scores(self, query: Tensor) -> Tensor:
        return self.keys.dot(query @ self.projections.B)

    def mix(self, weights: Tensor) -> Tensor:
        return self.values.mix(weights) @ self.projections.B_v.transpose(-1, -2)


class LatentLayer(LayerCache):
    """One layer of per-head latents, with optional exact sinks and an exact recent window.

    Args:
        projections: the pairs of this layer for a context of the given length; called once, when the context is
            compressed (a byte budget with exact tokens beside the latents depends on the length).
        sinks: first tokens that stay exact.
        window: most recent tokens that stay exact; a token that leaves the window is projected.
        storage: of the latents, and of what stays exact.
    """

    def __init__(
        self, projections: LayerProjections, sinks: int = 0, window: int = 0, storage: Storage = EXACT
    ) -> None:
        super().__init__()
        self.source = projections
        self.projections: HeadProjections | None = None
        self.sinks, self.window = sinks, window
        self.latent_keys = storage.rows(SUITED, dimension_major=True)
        self.latent_values = storage.rows(SUITED, dimension_major=True)
        self.sink_keys, self.sink_values = storage.kept(step=1), storage.kept(step=1)
        self.recent_keys, self.recent_values = storage.kept(), storage.kept()
        self.sink_columns: Tensor | None = None  # (batch, sinks): where each row's sinks stand, if rows are padded

    def store(self, keys: Tensor, values: Tensor) -> None:
        tokens = keys.shape[2]
        self.projections = self.source(tokens)
        split = max(min(self.sinks, tokens), tokens - self.window)
        start = self._take_sinks(keys, values, split)
        # Aᵀ Kᵀ is the product in the layout of the buffers: no copy is needed to turn it.
        valid = self._projected(start, split)
        self.latent_keys.take(self.projections.A.mT @ keys[:, :, start:split].mT, valid)
        self.latent_values.take(self.projections.A_v.mT @ values[:, :, start:split].mT, valid)
        if self.window:
            self.recent_keys.set(keys[:, :, split:])
            self.recent_values.set(values[:, :, split:])

    def _take_sinks(self, keys: Tensor, values: Tensor, split: int) -> int:
        """Copy the exact sinks of the first `split` tokens; the column at which the latents start."""
        sinks = min(self.sinks, split)
        valid = self.valid
        self.sink_columns = None
        if not sinks:
            return 0
        if valid is None:
            self.sink_keys.set(keys[:, :, :sinks])
            self.sink_values.set(values[:, :, :sinks])
            return sinks
        # Every row's sinks are its own first tokens, behind its padding: they are gathered, and the latents keep all
        # columns, of which the mask hides the sinks.
        first = valid.int().argmax(dim=1, keepdim=True)
        self.sink_columns = (first + torch.arange(sinks, device=keys.device)).clamp(max=split - 1)
        index = self.sink_columns[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        self.sink_keys.set(keys.gather(2, index))
        self.sink_values.set(values.gather(2, index))
        return 0

    def _projected(self, start: int, split: int) -> Tensor | None:
        """(batch, split − start), False on padding and on sinks among the columns of the latents; None for neither."""
        valid = self.valid
        if valid is None:
            return None
        if self.sink_columns is not None:
            valid = valid.scatter(1, self.sink_columns, False)
        return valid[:, start:split]

    def append(self, keys: Tensor, values: Tensor) -> None:
        assert self.projections is not None
        if self.window:
            self.recent_keys.append(keys)
            self.recent_values.append(values)
            return  # the queries of this pass still see exact keys; `attend_compressed` lets the oldest go afterwards
        self.latent_keys.append(keys @ self.projections.A)
        self.latent_values.append(values @ self.projections.A_v)

    def attend_compressed(self, query: Tensor, attention_mask: Tensor | None, scaling: float) -> Tensor:
        if self.sink_columns is not None:
            attention_mask = self._mask_of_gathered_sinks(query, attention_mask)
        output = segmented_attention(query, self._segments(), attention_mask, scaling)
        self._age()
        return output

    def _mask_of_gathered_sinks(self, query: Tensor, mask: Tensor | None) -> Tensor:
        """The mask in the order of the segments: sinks first, and hidden among the latents."""
        assert self.sink_columns is not None
        batch, _, queries, _ = query.shape
        if mask is None:
            mask = causal_mask(queries, self.logical_length, query.device)
        mask = mask.expand(batch, 1, queries, -1)
        columns = self.sink_columns[:, None, None, :].expand(-1, 1, queries, -1)
        return torch.cat([mask.gather(3, columns), hide(mask, columns)], dim=3)

    def _segments(self) -> list[Segment]:
        assert self.projections is not None
        heads = self.projections.A.shape[0]
        segments: list[Segment] = []
        if len(self.sink_keys):
            segments.append(StoredSegment(self.sink_keys, self.sink_values, heads))
        segments.append(LatentSegment(self.latent_keys, self.latent_values, self.projections))
        if len(self.recent_keys):
            segments.append(StoredSegment(self.recent_keys, self.recent_values, heads))
        return segments

    def _age(self) -> None:
        """Project what has left the window, a growth step at a time: moving rows at every token would cost more."""
        surplus = len(self.recent_keys) - self.window
        if not self.window or surplus < GROWTH_STEP:
            return
        assert self.projections is not None
        self.latent_keys.append(self.recent_keys.drop_front(surplus) @ self.projections.A)
        self.latent_values.append(self.recent_values.drop_front(surplus) @ self.projections.A_v)

    def compressed_nbytes_by_part(self) -> dict[str, int]:
        parts = {
            "latent_keys": self.latent_keys.nbytes(),
            "latent_values": self.latent_values.nbytes(),
            "sinks": self.sink_keys.nbytes() + self.sink_values.nbytes(),
            "window": self.recent_keys.nbytes() + self.recent_values.nbytes(),
        }
        return {part: size for part, size in parts.items() if size}

    def fixed_nbytes(self) -> int:
        return 0 if self.projections is None else self.projections.nbytes()

    def compressed_dense(self) -> tuple[Tensor, Tensor]:
        assert self.projections is not None
        keys = [self.latent_keys.dense() @ self.projections.B.transpose(-1, -2)]
        values = [self.latent_values.dense() @ self.projections.B_v.transpose(-1, -2)]
        if self.sink_columns is not None:
            index = self.sink_columns[:, None, :, None].expand(-1, keys[0].shape[1], -1, keys[0].shape[3])
            keys[0] = keys[0].scatter(2, index, self.sink_keys.dense())
            values[0] = values[0].scatter(2, index, self.sink_values.dense())
        elif len(self.sink_keys):
            keys.insert(0, self.sink_keys.dense())
            values.insert(0, self.sink_values.dense())
        if self.window:
            keys.append(self.recent_keys.dense())
            values.append(self.recent_values.dense())
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)

    def buffers(self) -> Sequence[RowBuffer]:
        return (
            self.latent_keys,
            self.latent_values,
            self.sink_keys,
            self.sink_values,
            self.recent_keys,
            self.recent_values,
        )

    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        super().map_batch(select)
        if self.sink_columns is not None:
            self.sink_columns = select(self.sink_columns)

    def crop_compressed(self, tokens: int) -> None:
        sinks = 0 if self.sink_columns is not None else len(self.sink_keys)
        recent = tokens - sinks - len(self.latent_keys)
        if self.window and recent < 0:
            raise UserError(
                "cannot crop into tokens that have left the exact window: use window=0 or start a new cache"
            )
        if tokens < len(self.sink_keys):
            raise UserError(f"cannot crop into the {len(self.sink_keys)} exact sinks: start a new cache")
        if self.window:
            self.recent_keys.crop(recent)
            self.recent_values.crop(recent)
        else:
            self.latent_keys.crop(tokens - sinks)
            self.latent_values.crop(tokens - sinks)
