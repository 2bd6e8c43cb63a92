"""Caches that hold at most a set number of entries, and make room by merging (or evicting) while they are filled.

The prompt is read in windows, whatever the length of the forward passes: a layer's windows depend only on the layers
below, so a layer may pass through all of its windows before the next layer starts. After each window of a sequence's
own tokens, if it has more entries than its limit, the cheapest adjacent pairs behind its first tokens are merged. At no
time does a layer hold more than limit + window entries of a sequence.

Keys stand at running positions: the sums of the cardinalities before them. Without clipping and eviction these are the
model's own positions, and nothing is rotated but what is merged. Causality needs nothing more: entries are merged
only after a window, of tokens that every later query may see. Where the next window's queries decide, what was read
before is merged when that window begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from kvgauge.architecture.rotary import Rotary
from kvgauge.attend.mask import Mask
from kvgauge.errors import UserError
from kvgauge.layers.cache import LayerCache
from kvgauge.layers.two_phase import TwoPhaseLayer
from kvgauge.methods.merging.layer_entries import LayerEntries
from kvgauge.methods.merging.merging_cache import MergingCache
from kvgauge.methods.merging.merging_entries import MergingEntries
from kvgauge.methods.merging.policy import MergePolicy
from kvgauge.methods.merging.positions import NewTokens, RunningPositions
from kvgauge.methods.merging.tally import Tally
from kvgauge.methods.merging.windows import Windows
from kvgauge.store.rows import RowBuffer
from kvgauge.store.steps import Steps


class MergedLayer(LayerCache):
    """One layer of merged entries; see the module docstring.

    Args:
        policy: limits and rules.
        rotary: of the model.
        freeze: tokens of the context → the layer that takes over the entries once the context is complete; nothing
            merges after that. None: the entries stay here and go on merging.

    Attributes:
        entries: what is stored, in its present state.
        windows, positions, tally: of its rows, in every state.
    """

    is_croppable = False
    entries_type: ClassVar[type[MergingEntries]] = MergingEntries

    entries: LayerEntries

    def __init__(
        self, policy: MergePolicy, rotary: Rotary, freeze: Callable[[int], TwoPhaseLayer] | None = None
    ) -> None:
        super().__init__()
        self.policy, self.rotary, self.freeze = policy, rotary, freeze
        self._begin()

    def _begin(self) -> MergingEntries:
        """As new."""
        self.windows = Windows(self.policy.window, self._expected_limits)
        self.positions, self.tally = RunningPositions(self.rotary), Tally()
        self.entries = entries = self.entries_type(self.policy, self.windows, self.positions, self.tally)
        self._incoming: tuple[Tensor, Tensor] | None = None
        return entries

    @property
    def owner(self) -> MergingCache:
        assert isinstance(self.cache, MergingCache)
        return self.cache

    def _expected_limits(self, final: bool = False) -> list[int]:
        """The most entries of each row: by the tokens that are still to come, or in the end by those that came."""
        sure = final or bool(self.owner.expected)
        rows = self.owner.row_tokens(self.logical_length, len(self.windows.counts), final=final)
        return [self.policy.limit(tokens, sure=sure) for tokens in rows]

    # -- the contract of LayerCache ------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.windows.begin(key_states.shape[0])
            self.positions.begin([0] * key_states.shape[0])
        self.came(key_states.shape[-2])
        self._incoming = (key_states, value_states)
        return self, self

    def attend(self, query: Tensor, *, mask: Mask, scaling: float, position_ids: Tensor | None) -> Tensor:
        """See `kvgauge.attend.attention.Attendable`."""
        cache = self.owner
        if self.index == 0:
            cache.observe(query, mask, position_ids)
        assert self._incoming is not None
        keys, values = self._incoming
        self._incoming = None
        outputs, begin, queries, incoming = [], 0, query.shape[2], cache.new_on(query.device)
        while begin < queries:
            if self.policy.ahead:
                rest = slice(begin, queries)
                self.entries.look_ahead(query[:, :, rest], keys[:, :, rest], incoming.part(begin, queries), scaling)
            end = self.entries.window_end(begin, queries, incoming.valid)
            if end - begin == queries:
                outputs.append(self._attend_window(query, keys, values, incoming, scaling))
            else:
                part, new = slice(begin, end), incoming.part(begin, end)
                output = self._attend_window(query[:, :, part], keys[:, :, part], values[:, :, part], new, scaling)
                outputs.append(output)
            begin = end
        cache.layer_done(self.index)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _attend_window(self, query: Tensor, keys: Tensor, values: Tensor, new: NewTokens, scaling: float) -> Tensor:
        query, keys = self.positions.place(query, keys, new.lags)
        self.entries.append(keys, values, new.valid)
        output = self.entries.attend(query, scaling, new.valid)
        self.entries.end_windows()
        return output

    def compress(self) -> None:
        """Merge down to the limit, give back spare capacity and forget what only the next merge would need."""
        if self.compressed or not self.is_initialized:
            return
        self.windows.fixed = self._expected_limits(final=True)
        self.entries = self.entries.completed(self.freeze and partial(self.freeze, self.logical_length))
        self.compressed = True
        every = self.owner.every
        if every is not None:
            tokens = self.owner.row_tokens(self.logical_length, len(self.windows.counts), final=True)
            self.windows.go_on(every, tokens, partial(self.policy.limit, sure=True))

    def compress_again(self) -> None:
        """Windows of the answer end by themselves, in every row by its own tokens."""

    def fix_shapes(self, steps: Steps) -> None:
        """See `LayerCache.fix_shapes`."""
        self.entries.fix_shapes(steps)
        self.positions.prepare(self.device)
        self.steps = steps
        self.logical_length += steps.room

    def release_shapes(self) -> None:
        """See `LayerCache.release_shapes`."""
        assert self.steps is not None
        self.entries.release_shapes(self.steps)
        super().release_shapes()

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """See `LayerCache.fill`; it gets as many entries as it keeps of so many tokens, each standing for as many."""
        tokens = keys.shape[2]
        entries = min(tokens, self.policy.entries(tokens))
        sizes = torch.full((entries,), tokens // entries, dtype=torch.int32, device=keys.device)
        sizes[: tokens % entries] += 1
        if self.policy.evicts:
            sizes.fill_(1)
        elif self.policy.clip is not None:
            sizes.clamp_(max=self.policy.clip)
        self.lazy_initialization(keys, values)
        self.logical_length = tokens
        cardinalities = sizes.expand(keys.shape[0], -1)
        self._begin().take(keys[:, :, :entries], values[:, :, :entries], cardinalities, tokens)

    def attend_entries(self, query: Tensor, scaling: float) -> Tensor:
        return self.entries.attend_entries(query, scaling)

    @property
    def physical_length(self) -> int:
        return len(self.entries)

    def nbytes_by_part(self) -> dict[str, int]:
        parts = self.entries.nbytes_by_part() | {"angles": self.positions.nbytes()}
        return {part: size for part, size in parts.items() if size}

    def fixed_nbytes(self) -> int:
        return self.entries.fixed_nbytes()

    def dense(self) -> tuple[Tensor, Tensor]:
        if self.tally.merges or any(self.positions.lags) or not self.entries.single_tokens:
            raise UserError(
                f"{self.policy.name} has merged or evicted entries: they no longer stand for single tokens, "
                f"so there are no dense keys and values"
            )
        return self.entries.dense()

    def buffers(self) -> Sequence[RowBuffer]:
        return self.entries.buffers()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise UserError(f"{self.policy.name} cannot be cropped: merged entries cannot be taken apart")

    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        self.entries.map_batch(select)
        if self.is_initialized:
            self.windows.map_batch(select, self.device)
            self.positions.map_batch(select, self.device)

    def reset(self) -> None:
        super().reset()
        self._begin()
