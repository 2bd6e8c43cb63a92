"""The merging prefill as published: every window runs through the model twice, with eager attention.

The first pass is thrown away; it is there for the attention matrices of all layers, whose column sums choose the pairs.
The cache is then merged, and the second pass, over the merged entries, appends the window. This is the reference that
the one pass of `kvgauge.methods.merging.merged` is timed against; nothing else uses it.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from kvgauge.attend.cardinalities import HIDDEN, log_cardinalities
from kvgauge.methods.merging.merged import MergedLayer
from kvgauge.methods.merging.merging_cache import MergingCache
from kvgauge.methods.merging.merging_entries import MergingEntries


class TwoPassEntries(MergingEntries):
    """Attends with the whole matrix at once; in the first pass it keeps the matrix and nothing of the window."""

    probing = False
    probed: tuple[Tensor, Tensor] | None = None  # all keys and values of the first pass
    matrix: Tensor | None = None  # (batch, kv heads, groups, queries, entries)

    def window_end(self, begin: int, queries: int, valid: Tensor | None) -> int:
        return queries  # the cache feeds one window at a time

    def append(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
        if not self.probing:
            super().append(keys, values, valid)
            return
        past_keys, past_values = self.readable()
        self.probed = torch.cat([past_keys, keys], dim=2), torch.cat([past_values, values], dim=2)

    def attend(self, query: Tensor, scaling: float, valid: Tensor | None = None) -> Tensor:
        keys, values = self.probed if self.probed is not None else self.readable()
        self.groups = query.shape[1] // keys.shape[1]
        output, matrix = self._eager(query, keys, values, scaling)
        self.matrix = matrix if self.probing else None
        self.probed = None
        return output

    def _eager(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        batch, heads, queries, head_dim = query.shape
        kv_heads, entries = keys.shape[1:3]
        grouped = query.reshape(batch, kv_heads, heads // kv_heads, queries, head_dim)
        scores = grouped @ keys[:, :, None].transpose(-1, -2) * scaling
        cardinalities = self.held.cardinalities
        if cardinalities is not None:
            bias = log_cardinalities(cardinalities, scores.dtype)
            scores = scores + functional.pad(bias, (0, entries - bias.shape[1]))[:, None, None, None]
        later = torch.ones(queries, queries, dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(functional.pad(later, (entries - queries, 0)), HIDDEN)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
        output = weights @ values[:, :, None]
        return output.reshape(batch, heads, queries, -1).transpose(1, 2), weights

    def end_windows(self) -> None:
        """Nothing: the cache merges between the passes."""

    def merge_past(self, queries: int) -> None:
        """Merge what is cached by the column sums of the first pass over it."""
        assert self.matrix is not None
        past = len(self.held)
        sums = self.matrix[..., :past].sum(dim=(2, 3)).float()
        # Every entry was seen by every query of the window, also those that `held` takes for younger.
        age = torch.arange(past, 0, -1, device=sums.device).clamp(max=queries) / queries
        self.matrix = None
        self.held.attention.set((sums * age).unsqueeze(-1))
        rows = len(self.windows.counts)
        self.windows.fresh = [queries] * rows
        self.make_room([True] * rows)
        self.held.attention.clear()


class TwoPassLayer(MergedLayer):
    """A layer of `TwoPassEntries`."""

    entries_type: ClassVar[type[MergingEntries]] = TwoPassEntries
    entries: TwoPassEntries


class TwoPassCache(MergingCache):
    """Drives the two passes; unpadded batches only."""

    layers: list[TwoPassLayer]

    def drive(self, model: PreTrainedModel, ids: Tensor, mask: Tensor | None) -> Tensor:
        """See `KVCache.drive`."""
        assert mask is None
        logits = None
        for part in ids.split(self.own[0].policy.window, dim=1):
            if self.get_seq_length():
                self._probe(model, part)
            logits = model(input_ids=part, past_key_values=self, use_cache=True, logits_to_keep=1).logits[:, -1]
        assert logits is not None
        return logits

    def _probe(self, model: PreTrainedModel, part: Tensor) -> None:
        positions = self.positions
        for layer in self.own:
            layer.entries.probing = True
        model(input_ids=part, past_key_values=self, use_cache=True, logits_to_keep=1)
        self.positions = positions
        for layer in self.own:
            layer.entries.probing = False
            layer.logical_length -= part.shape[1]
            layer.entries.merge_past(part.shape[1])
