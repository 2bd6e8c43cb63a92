"""Per-head latents that are made while the prompt comes in: the exact keys of the whole context never exist.

Projections are static, so a chunk of the prompt can be projected as soon as it has been attended to. The queries of a
chunk see the tokens of their own chunk exactly and those before as latents; with a chunk as long as the context the
prefill is the model's own. Between two layers nothing exact is left but the window, so the peak memory of a prefill is
the latents of all layers and one layer's chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvgauge.attend.attention import ExactSegment, Segment, exact_attention, segmented_attention
from kvgauge.attend.mask import CAUSAL, Mask
from kvgauge.errors import UserError
from kvgauge.layers.adoption import Prefill
from kvgauge.layers.cache import KVCache
from kvgauge.methods.per_head.latents import HeadProjections, LatentLayer


class StreamingLatentLayer(LatentLayer):
    """A `LatentLayer` that projects every chunk of the context right after it has been attended to.

    Attributes:
        expected: tokens of the context, if they were announced; a budget with exact tokens depends on them.
    """

    expected: int | None = None

    def attend_exact(self, query: Tensor, mask: Mask, scaling: float) -> Tensor:
        if self.projections is None:
            assert self.cache is not None
            for layer in self.cache.own:
                layer.prepare(self.exact_keys.view())
        output = self._attend_incoming(query, mask, scaling)
        self._absorb()
        return output

    def _attend_incoming(self, query: Tensor, mask: Mask, scaling: float) -> Tensor:
        """Attention to a context of which some tokens, or none yet, are latents."""
        if not self._absorbed:
            return exact_attention(query, self.exact_keys.view(), self.exact_values.view(), mask, scaling)
        mask = self.sinks.mask(mask, query.shape[2], self.logical_length)
        return segmented_attention(query, self._segments(), mask, scaling)

    def attend_entries(self, query: Tensor, scaling: float) -> Tensor:
        return (self.attend_compressed if self.compressed else self._attend_incoming)(query, CAUSAL, scaling)

    @property
    def _absorbed(self) -> bool:
        """Some of the context is latents already."""
        return len(self.latent_keys) > 0

    def prepare(self, keys: Tensor) -> None:
        """Get the pairs, and where the context's length is known the memory for all its latents.

        Every layer does so before any has attended: between the activations of a forward pass, which come and go, the
        latents would leave holes in the C library's heap that nothing else fits into.

        Args:
            keys: some keys of any layer, for their batch, heads and dtype.
        """
        self.projections = self._announced_projections()
        if self.expected is None:
            return
        gathered = self.cache is not None and self.cache.valid is not None  # sinks keep their columns among the latents
        tokens = self.expected - self.window - (0 if gathered else self.sinks.limit)
        for latents, projection in (
            (self.latent_keys, self.projections.A),
            (self.latent_values, self.projections.A_v),
        ):
            latents.reserve(tokens)
            latents.append(keys[:, :, :0].to(projection.device) @ projection)

    def _announced_projections(self) -> HeadProjections:
        if self.expected is None and self.sinks.limit + self.window:
            raise UserError(
                "compress_prefill with exact sinks or a window needs the length of the context first: "
                "call cache.expect(tokens) or give context_length to new_cache"
            )
        return self.source(self.expected if self.expected is not None else 1)

    def _absorb(self) -> None:
        """Project what has left the exact window; before that, take the sinks out of the first tokens."""
        assert self.projections is not None
        surplus = len(self.exact_keys) - self.window
        if not self._absorbed and surplus <= self._columns_of_sinks():
            return  # the sinks of some row are still to come
        if surplus <= 0:
            return
        keys, values = self.exact_keys.view()[:, :, :surplus], self.exact_values.view()[:, :, :surplus]
        if not self._absorbed:
            keys, values, _ = self.sinks.take(keys, values, self.valid)
        for latents, projection, rows in (
            (self.latent_keys, self.projections.A, keys),
            (self.latent_values, self.projections.A_v, values),
        ):
            latents.append((projection.mT @ rows.mT).mT)
        for exact in (self.exact_keys, self.exact_values):
            if self.window:
                exact.set(exact.view()[:, :, surplus:])
            else:
                exact.clear()

    def _columns_of_sinks(self) -> int:
        """How many columns hold the sinks of every row, padding before them included."""
        valid = self.valid
        if not self.sinks.limit or valid is None:
            return self.sinks.limit
        return int((~valid).sum(dim=1).max()) + self.sinks.limit

    def _segments(self) -> list[Segment]:
        segments = super()._segments()
        if not self.compressed and len(self.exact_keys):
            segments.append(ExactSegment(self.exact_keys.view(), self.exact_values.view()))
        return segments

    def compress(self) -> None:
        if self.compressed or not self.is_initialized:
            return
        if not self._absorbed:
            super().compress()
            return
        if self.window:
            self.recent_keys.set(self.exact_keys.view())
            self.recent_values.set(self.exact_values.view())
        self.exact_keys.clear()
        self.exact_values.clear()
        self.latent_keys.trim()
        self.latent_values.trim()
        self.compressed = True

    def nbytes_by_part(self) -> dict[str, int]:
        exact = self.exact_keys.nbytes() + self.exact_values.nbytes()
        return ({"exact": exact} if exact else {}) | self.compressed_nbytes_by_part()

    def dense(self) -> tuple[Tensor, Tensor]:
        if not self.compressed and self._absorbed:
            raise UserError("the context is still coming in: call cache.compress() before looking into the cache")
        return super().dense()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove and not self.compressed and self._absorbed:
            raise UserError("a context that is still coming in cannot be cropped: call cache.compress() first")
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.projections = None


class StreamingLatentCache(KVCache):
    """A cache of `StreamingLatentLayer`."""

    prefill = Prefill.OWN

    def __init__(self, layers: Sequence[StreamingLatentLayer], *, context_length: int | None = None) -> None:
        super().__init__(layers, context_length=context_length)
        if context_length is not None:
            self.expect(context_length)

    def expect(self, tokens: int, padding: Sequence[int] | None = None) -> None:
        for layer in self.own:
            layer.expected = tokens
