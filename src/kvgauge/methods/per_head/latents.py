"""Per-head latents: r numbers instead of head_dim for every key and value, and attention in r dimensions.

With a pair (A, B) per kv-head, keys are stored as ``K̃ = K A`` and asked by ``q B``; with (A_v, B_v) values are stored
as ``Ṽ = V A_v`` and the weighted sum is expanded once, ``(p Ṽ) B_vᵀ``. Keys and values are never rebuilt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvgauge.architecture.head_frame import HeadFrame
from kvgauge.attend.attention import OnePassSegment, Segment, StoredTokens, segmented_attention
from kvgauge.attend.mask import Mask
from kvgauge.errors import UserError
from kvgauge.kernels.cpu.decode_attention import decode_attention
from kvgauge.kernels.cpu.head_projection import head_projection
from kvgauge.kernels.cpu.stored_attention import StoredRun
from kvgauge.kernels.cpu.stored_rows import plain_rows
from kvgauge.layers.sinks import ExactSinks
from kvgauge.layers.stored import StoredSegment
from kvgauge.layers.two_phase import TwoPhaseLayer
from kvgauge.store.buffers import GROWTH_STEP, GrowingBuffer
from kvgauge.store.rows import RowBuffer
from kvgauge.store.storage import EXACT, Storage


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

    def framed(self, frame: HeadFrame) -> HeadProjections:
        """The pairs for keys and queries that stand in `frame`: the same latents and scores."""
        if frame.identity:
            return self
        A, B = frame.queries(self.A.mT).mT, frame.keys(self.B.mT).mT
        return replace(self, A=A.contiguous(), B=B.contiguous())


# Channels of latents differ in size and offset by far more than tokens do: a grid within a token suits none of
# them, and balancing them costs the first channels, which matter most.
SUITED = "channel"

LayerProjections = Callable[[int], HeadProjections]  # context length → the pairs of one layer


class LatentSegment(OnePassSegment, StoredTokens):
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

    def stored_run(self) -> StoredRun | None:
        """See `kvgauge.attend.attention.StoredTokens`."""
        pairs = self.projections
        keys, values = self.keys.compiled(), self.values.compiled()
        asking, expansion = plain_rows(pairs.B[None]), plain_rows(pairs.B_v[None])
        if keys is None or values is None or asking is None or expansion is None:
            return None
        return StoredRun(keys, values, asking, expansion)

    def attend_once(self, query: Tensor, scaling: float, mask: Mask) -> tuple[Tensor, Tensor] | None:
        """See `kvgauge.attend.attention.OnePassSegment`."""
        if not isinstance(self.keys, GrowingBuffer) or not isinstance(self.values, GrowingBuffer):
            return None
        pairs = self.projections
        keys, values = self.keys.view(), self.values.view()
        seen = mask.row(query.shape[0], len(self))
        return decode_attention(query, keys, values, scaling, seen, asking=pairs.B, expansion=pairs.B_v)


class LatentLayer(TwoPhaseLayer):
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
        self.sinks, self.window = ExactSinks(sinks, storage), window
        self.latent_keys = storage.rows(SUITED, dimension_major=True, part="keys")
        self.latent_values = storage.rows(SUITED, dimension_major=True)
        self.recent_keys, self.recent_values = storage.kept(), storage.kept()

    def store(self, keys: Tensor, values: Tensor) -> None:
        tokens = keys.shape[2]
        self.projections = self.source(tokens)
        split = max(min(self.sinks.limit, tokens), tokens - self.window)
        others_keys, others_values, valid = self.sinks.take(keys[:, :, :split], values[:, :, :split], self.valid)
        for latents, projection, rows in (
            (self.latent_keys, self.projections.A, others_keys),
            (self.latent_values, self.projections.A_v, others_values),
        ):
            if rows.device.type == "cpu":  # the product in the layout of the buffers: no copy is needed to turn it
                latents.take(projection.mT @ rows.mT, valid)
            else:
                latents.set(rows @ projection, valid)
        if self.window:
            self.recent_keys.set(keys[:, :, split:])
            self.recent_values.set(values[:, :, split:])

    def append(self, keys: Tensor, values: Tensor) -> None:
        assert self.projections is not None
        if self.window:
            self.recent_keys.append(keys)
            self.recent_values.append(values)
            return  # the queries of this pass still see exact keys; `attend_compressed` lets the oldest go afterwards
        for latents, rows, matrices in (
            (self.latent_keys, keys, self.projections.A),
            (self.latent_values, values, self.projections.A_v),
        ):
            projected = head_projection(rows, matrices)
            latents.append(rows @ matrices if projected is None else projected)

    def attend_compressed(self, query: Tensor, mask: Mask, scaling: float) -> Tensor:
        mask = self.sinks.mask(mask, query.shape[2], self.logical_length)
        output = segmented_attention(query, self._segments(), mask, scaling)
        self._age()
        return output

    def _segments(self) -> list[Segment]:
        assert self.projections is not None
        segments: list[Segment] = [*self.sinks.segments()]
        segments.append(LatentSegment(self.latent_keys, self.latent_values, self.projections))
        if len(self.recent_keys):
            segments.append(StoredSegment(self.recent_keys, self.recent_values, self.projections.A.shape[0]))
        return segments

    def _age(self, least: int = GROWTH_STEP) -> None:
        """Project what has left the window, `least` tokens or more: moving rows at every token would cost more."""
        surplus = len(self.recent_keys) - self.window
        if not self.window or surplus < least:
            return
        assert self.projections is not None
        self.latent_keys.append(self.recent_keys.drop_front(surplus) @ self.projections.A)
        self.latent_values.append(self.recent_values.drop_front(surplus) @ self.projections.A_v)

    def compress_again(self) -> None:
        """New tokens are latents as soon as they have left the window."""
        self._age(least=1)
        for buffer in self.buffers():
            buffer.trim()

    def compressed_nbytes_by_part(self) -> dict[str, int]:
        parts = {
            "latent_keys": self.latent_keys.nbytes(),
            "latent_values": self.latent_values.nbytes(),
            "sinks": self.sinks.nbytes(),
            "window": self.recent_keys.nbytes() + self.recent_values.nbytes(),
        }
        return {part: size for part, size in parts.items() if size}

    def fixed_nbytes(self) -> int:
        return 0 if self.projections is None else self.projections.nbytes()

    def compressed_dense(self) -> tuple[Tensor, Tensor]:
        assert self.projections is not None
        keys, values = self.sinks.restored(
            self.latent_keys.dense() @ self.projections.B.transpose(-1, -2),
            self.latent_values.dense() @ self.projections.B_v.transpose(-1, -2),
        )
        if not self.window:
            return keys, values
        recent_keys, recent_values = self.recent_keys.dense(), self.recent_values.dense()
        return torch.cat([keys, recent_keys], dim=2), torch.cat([values, recent_values], dim=2)

    def buffers(self) -> Sequence[RowBuffer]:
        return (
            self.latent_keys,
            self.latent_values,
            *self.sinks.buffers,
            self.recent_keys,
            self.recent_values,
        )

    def growing(self) -> Sequence[RowBuffer] | None:
        return None if self.window else (self.latent_keys, self.latent_values)

    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        super().map_batch(select)
        self.sinks.map_columns(select)

    def reversible_tokens(self) -> int:
        if not self.window:
            return min(self.latent_keys.room(), self.latent_values.room())
        surplus = len(self.recent_keys) - self.window
        return min(self.recent_keys.room(), self.recent_values.room(), max(0, GROWTH_STEP - 1 - surplus))

    def crop_compressed(self, tokens: int) -> None:
        sinks = self.sinks.cut
        recent = tokens - sinks - len(self.latent_keys)
        if self.window and recent < 0:
            raise UserError(
                "cannot crop into tokens that have left the exact window: use window=0 or start a new cache"
            )
        self.sinks.crop(tokens)
        if self.window:
            self.recent_keys.crop(recent)
            self.recent_values.crop(recent)
        else:
            self.latent_keys.crop(tokens - sinks)
            self.latent_values.crop(tokens - sinks)
