"""The cache of a whole model whose layers merge: what its layers have to know of a forward pass and of the context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from kvgauge.attend.mask import Mask
from kvgauge.layers.adoption import Prefill
from kvgauge.layers.cache import KVCache
from kvgauge.methods.merging.positions import NewTokens

if TYPE_CHECKING:
    from kvgauge.methods.merging.merged import MergedLayer


class MergingCache(KVCache):
    """A cache of `MergedLayer`s, which know from it how many tokens will come and which of them are padding."""

    prefill = Prefill.OWN
    moves: ClassVar[bool] = True
    fillable: ClassVar[bool] = True

    def __init__(self, layers: Sequence[MergedLayer], *, context_length: int | None = None) -> None:
        super().__init__(layers, context_length=context_length)
        self.expected = context_length or 0
        self.expected_padding: Sequence[int] | None = None
        self.new = NewTokens()
        self.pads: list[int] | None = None  # padding of each row so far

    def expect(self, tokens: int, padding: Sequence[int] | None = None) -> None:
        if tokens >= self.expected:
            self.expected, self.expected_padding = tokens, padding

    def row_tokens(self, seen: int, rows: int, *, final: bool) -> list[int]:
        """Tokens of each row's context: those that came, and those that are still to come.

        Args:
            seen: tokens so far, padding included.
            rows: of the batch.
            final: no more will come.
        """
        total = seen if final else max(self.expected, seen)
        none = [0] * rows
        to_come = none if final or self.expected_padding is None else self.expected_padding
        return [total - padding for padding in map(max, self.pads or none, to_come)]

    def observe(self, query: Tensor, mask: Mask, position_ids: Tensor | None) -> None:
        super().observe(query, mask, position_ids)
        queries, total = query.shape[2], self.get_seq_length()
        assert self.positions is not None
        positions = self.positions[:, -queries:]
        running = torch.arange(total - queries, total, device=query.device)[None]
        valid, self.pads = None, None
        if self.valid is not None:
            new = self.valid[:, total - queries :]
            padding = (~self.valid).sum(dim=1)
            self.pads = padding.tolist()
            running = running - (padding - (~new).sum(dim=1))[:, None] - (~new).cumsum(dim=1)
            if not bool(new.all()):
                valid, running = new, torch.where(new, running, positions)
        lags = running - positions
        self.new = NewTokens(valid, lags if bool(lags.any()) else None)

    def _map_records(self, select: Callable[[Tensor], Tensor]) -> None:
        super()._map_records(select)
        for name in ("pads", "expected_padding"):
            numbers = getattr(self, name)
            if numbers is not None:
                setattr(self, name, select(torch.tensor(numbers)).tolist())

    @property
    def merge_counts(self) -> list[int]:
        """Of each layer: merges so far, one for every sequence, kv-head and new entry."""
        return [layer.tally.merges for layer in self.own]

    @property
    def guard_counts(self) -> list[int]:
        """Of each layer: those merges whose quadratic form had no usable minimiser; see `merge_keys.key_weights`."""
        return [layer.tally.guarded for layer in self.own]

    def remarks(self) -> dict[str, list[int]]:
        return {"merges": self.merge_counts, "guarded_merges": self.guard_counts}

    def reset(self) -> None:
        super().reset()
        self.expected, self.expected_padding = self.context_length or 0, None
        self.new, self.pads = NewTokens(), None
