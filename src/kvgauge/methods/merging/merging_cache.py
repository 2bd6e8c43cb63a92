"""The cache of a whole model whose layers merge: what its layers have to know of a forward pass and of the context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from kvgauge.attend.mask import Mask
from kvgauge.errors import UserError
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
        self._new: dict[torch.device, NewTokens] = {}  # on every device that asked
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

    def new_on(self, device: torch.device) -> NewTokens:
        """The tokens of the running forward pass, on a device."""
        if device not in self._new:
            self._new[device] = next(iter(self._new.values())).to(device)
        return self._new[device]

    def observe(self, query: Tensor, mask: Mask, position_ids: Tensor | None) -> None:
        super().observe(query, mask, position_ids)
        if self.steps is not None:
            return
        queries, total = query.shape[2], self.get_seq_length()
        assert self.positions is not None
        positions = self.positions[:, -queries:]
        running = torch.arange(total - queries, total, device=query.device)[None]
        valid, before = None, self.pads
        if self.valid is None:
            self.pads = None
        else:
            new = self.valid[:, total - queries :]
            padding = (~self.valid).sum(dim=1)
            # The last token of a row is no padding: a single one adds none, and the host need not wait to know.
            if queries > 1 or before is None:
                self.pads = padding.tolist()
            running = running - (padding - (~new).sum(dim=1))[:, None] - (~new).cumsum(dim=1)
            if self.pads != (before or [0] * len(padding)):
                valid, running = new, torch.where(new, running, positions)
        lags = running - positions
        # A padded step has made the device wait once already, for its mask: there the lags are taken as they are.
        known = lags.device.type == "cpu" or queries > 1 or self.valid is None
        lagging = bool(lags.any()) if known else True
        self._new = {query.device: NewTokens(valid, lags if lagging else None)}

    def fix_shapes(self, tokens: int) -> None:
        if any(new.lags is not None and bool(new.lags.any()) for new in self._new.values()):
            raise UserError("the model's positions are not those of the tokens: decode steps are no one graph")
        self._new = {layer.device: NewTokens() for layer in self.own}
        super().fix_shapes(tokens)

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
        self._new, self.pads = {}, None
