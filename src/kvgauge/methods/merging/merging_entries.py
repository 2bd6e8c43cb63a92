"""Entries that make room for others: merged, or evicted, whenever a window ends with too many of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvgauge.attend.counted_attention import cardinality_attention, counted_attention
from kvgauge.errors import UserError
from kvgauge.layers.two_phase import TwoPhaseLayer
from kvgauge.methods.merging.entry_buffers import EntryBuffers
from kvgauge.methods.merging.frozen_entries import FrozenEntries
from kvgauge.methods.merging.layer_entries import LayerEntries
from kvgauge.methods.merging.merge_costs import pair_costs
from kvgauge.methods.merging.merge_entries import (
    Entries,
    align,
    averaged_hessian,
    current_hessian,
    drop_overlaps,
    evict,
    merge,
)
from kvgauge.methods.merging.merge_pairs import choose_pairs
from kvgauge.methods.merging.policy import MergePolicy
from kvgauge.methods.merging.positions import NewTokens, RunningPositions
from kvgauge.methods.merging.tally import Tally
from kvgauge.methods.merging.windows import Windows
from kvgauge.store.rows import RowBuffer
from kvgauge.store.steps import Steps


class MergingEntries(LayerEntries):
    """The entries of a layer while the context is read, and where nothing else takes them over while decoding.

    Args:
        policy: limits and rules.
        windows, positions: of the layer's rows.
        tally: of the layer.

    Attributes:
        held: what is stored.
    """

    def __init__(self, policy: MergePolicy, windows: Windows, positions: RunningPositions, tally: Tally) -> None:
        self.policy, self.windows, self.positions, self.tally = policy, windows, positions, tally
        self.held = EntryBuffers(at_end=policy.traits.position == "last")
        self.groups = 1  # query heads of a kv-head
        self.fixed = False  # windows are not counted: see `fix_shapes`

    def take(self, keys: Tensor, values: Tensor, cardinalities: Tensor, tokens: int) -> None:
        """Hold, where nothing was, what is left of a context.

        Args:
            keys, values: (batch, num_key_value_heads, entries, head_dim), at their running positions.
            cardinalities: (batch, entries), 1 or more.
            tokens: of the context.
        """
        batch, _, entries, _ = keys.shape
        self.windows.begin(batch, entries, taken=1)
        self.positions.begin([tokens - total for total in cardinalities.sum(dim=1).tolist()])
        self.tally.most_entries = entries
        self.held.set(keys, values, cardinalities)

    def __len__(self) -> int:
        return max(self.windows.counts, default=0)

    # -- a forward pass ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def look_ahead(self, query: Tensor, keys: Tensor, new: NewTokens, scaling: float) -> None:
        begins = self.windows.begins(new.valid)
        if not any(begins):
            return
        surplus = self.windows.surplus(begins)
        if any(surplus) or self.policy.rule == "hessian":
            query, keys = self.positions.place(query, keys, new.lags)
            shares = self._asked(query, keys, new.valid, begins, scaling)
            self.held.attention.set(shares[..., None])
            self._merge(surplus, begins, self.held.read([0.0] * len(begins), self.groups))
            self.held.attention.clear()
        self.windows.restart(begins)

    def _asked(
        self, query: Tensor, keys: Tensor, valid: Tensor | None, begins: Sequence[bool], scaling: float
    ) -> Tensor:
        """Mean attention of the first window of new queries to every entry, (batch, num_key_value_heads, entries)."""
        past, batch, self.groups = len(self.held), query.shape[0], query.shape[1] // keys.shape[1]
        if valid is None:
            valid = torch.ones(batch, query.shape[2], dtype=torch.bool, device=query.device)
        asking = valid & (valid.cumsum(dim=1) <= self.policy.window) & valid.new_tensor(begins)[:, None]
        last = int(asking.any(dim=0).nonzero().max()) + 1
        query, keys, valid, asking = query[:, :, :last], keys[:, :, :last], valid[:, :last], asking[:, :last]
        held = self.held.cardinalities
        held = valid.new_ones((batch, past), dtype=torch.int32) if held is None else held
        # The values play no part in the sums.
        all_keys = torch.cat([self.held.keys.view(), keys], dim=2)
        cardinalities = torch.cat([held, valid.int()], dim=1)
        sums = counted_attention(query, all_keys, all_keys, cardinalities, scaling, asking)[1][..., :past]
        return sums / (asking.sum(dim=1).clamp(min=1) * self.groups)[:, None, None]

    def window_end(self, begin: int, queries: int, valid: Tensor | None) -> int:
        return self.windows.end(begin, queries, valid)

    @torch.no_grad()
    def append(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
        self.held.append(keys.detach(), values.detach(), valid)
        if self.fixed:
            return
        new, rows = keys.shape[2], len(self.windows.counts)
        added = [new] * rows if valid is None else valid.sum(dim=1).tolist()
        interrupted = self.windows.interrupted(added, new)
        self.windows.add(added)
        self.tally.most_entries = max(self.tally.most_entries, *self.windows.counts)
        if interrupted:
            # Padding in front of the new tokens of a row that has entries: they move up to them.
            entries = self.held.read([0.0] * rows, self.groups)
            self._replace(align(entries, entries.valid))

    def attend(self, query: Tensor, scaling: float, valid: Tensor | None = None) -> Tensor:
        keys, values = self.readable()
        self.groups = query.shape[1] // keys.shape[1]
        if not self._counting():
            return cardinality_attention(query, keys, values, self.held.cardinalities, scaling)
        output, sums = counted_attention(query, keys, values, self.held.cardinalities, scaling, valid)
        self.held.add_attention(sums)
        return output

    def readable(self) -> tuple[Tensor, Tensor]:
        """All keys and values as attention reads them."""
        return self.held.keys.view(), self.held.values.view()

    def _counting(self) -> bool:
        """Whether column sums are needed: a merge will follow."""
        return not self.policy.evicts and not self.policy.ahead and self.merges_ahead()

    def merges_ahead(self) -> bool:
        return self.windows.merges_ahead()

    @torch.no_grad()
    def end_windows(self) -> None:
        due = self.windows.due()
        if any(due) and not self.policy.ahead:
            self.make_room(due)
            self.windows.restart(due)
            if self.windows.grows and all(due):
                self.held.settle()  # what the merge was chosen by is no part of the budget

    def completed(self, successor: Callable[[], TwoPhaseLayer] | None) -> LayerEntries:
        everywhere = [True] * len(self.windows.counts)
        if not self.policy.ahead:
            self.make_room(everywhere)
        self.windows.restart(everywhere)
        self.held.settle()
        self.positions.forget()
        if successor is None:
            self.held.arrange_for_decoding()
            return self
        return FrozenEntries(successor(), *self.readable(), self.held.cardinalities)

    # -- steps of one shape --------------------------------------------------------------------------------------

    def fix_shapes(self, steps: Steps) -> None:
        fresh = max(self.windows.fresh)
        if self.policy.ahead:
            raise UserError(f"{self.policy.name} looks ahead before it merges: its decode steps are no one graph")
        if fresh + steps.room >= self.policy.window:
            raise UserError(
                f"{self.policy.name} merges after {self.policy.window - fresh} more tokens, and the shapes change: "
                f"fix them for fewer tokens, or take a larger window"
            )
        self.held.fix(steps, self._counting())
        self.fixed = True

    def release_shapes(self, steps: Steps) -> None:
        self.held.release(steps)
        self.windows.add([steps.count()] * len(self.windows.counts))
        self.tally.most_entries = max(self.tally.most_entries, *self.windows.counts)
        self.fixed = False

    # -- making room ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def make_room(self, due: Sequence[bool]) -> None:
        """Bring the rows whose window is over down to their limits."""
        surplus = self.windows.surplus(due)
        if any(surplus):
            if self.policy.evicts:
                self._evict(surplus)
            else:
                # The attention of rows that do not merge now stays a sum, that of the others becomes a mean.
                merging = [more > 0 for more in surplus]
                rows = zip(self.windows.fresh, merging, strict=True)
                read = self.held.read([float(fresh) if more else 0.0 for fresh, more in rows], self.groups)
                self._merge(surplus, merging, read)
        self.held.restart_attention(due)

    def _evict(self, surplus: Sequence[int]) -> None:
        entries = self.held.read([0.0] * len(surplus), self.groups)
        removed = torch.tensor(surplus, device=entries.keys.device)
        before = entries.cardinalities.sum(dim=1)
        kept = evict(entries, self._first_behind_start(entries), removed, self.positions.rotary)
        self.positions.add(before - kept.cardinalities.sum(dim=1))
        self._replace(kept)

    def _merge(self, surplus: Sequence[int], counted: Sequence[bool], entries: Entries) -> None:
        """Merge so many pairs of every row.

        Args:
            surplus: how many.
            counted: rows whose curvature is taken now.
            entries: what is held.
        """
        policy, rotary = self.policy, self.positions.rotary
        entries.behind = self._behind(entries)
        entries.hessian = self.present_hessian(entries, counted)
        wanted = torch.tensor(surplus, device=entries.keys.device)
        # Disjoint pairs at most halve a row: what is still over its limit goes another round.
        while bool((wanted > 0).any()):
            first = self._first_behind_start(entries)
            cost = pair_costs(entries, first, policy.traits.cost, policy.gamma, rotary)
            pairs = choose_pairs(cost, wanted, policy.traits.pairs, self._within(entries))
            wanted = wanted - pairs.sum(dim=1)
            before = entries.cardinalities.sum(dim=1)
            if policy.traits.pairs == "drop":
                entries, pairs = drop_overlaps(entries, pairs, rotary)
            entries.behind = self._behind(entries)
            entries, merges, guarded = merge(entries, pairs, policy.rule, policy.clip, rotary)
            self.positions.add(before - entries.cardinalities.sum(dim=1))
            self.tally.merges += int(merges.sum())
            self.tally.guarded += int(guarded.sum())
            self.windows.counts = entries.valid.sum(dim=1).tolist()
        self._replace(entries)

    def _within(self, entries: Entries) -> Tensor | None:
        """(batch, entries − 1): pairs that together stay within the clip; None where nothing is clipped."""
        if self.policy.clip is None:
            return None
        tokens = entries.cardinalities
        return tokens[:, :-1] + tokens[:, 1:] <= self.policy.clip

    def _behind(self, entries: Entries) -> Tensor | None:
        """See `Entries.behind`."""
        published = self.policy.traits.curvature == "published"
        return self._first_behind_start(entries) if published else None

    def present_hessian(self, entries: Entries, merging: Sequence[bool]) -> Tensor | None:
        """The diagonal h_ii of these rows, averaged over their windows; the others' stays as it is."""
        if self.policy.rule != "hessian":
            return None
        self.windows.take(merging)
        now, past = current_hessian(entries), self.held.past_hessian()
        windows = torch.tensor(self.windows.taken, device=now.device).clamp(min=1)
        before = torch.full_like(now, torch.nan) if past is None else past
        chosen = torch.tensor(merging, device=now.device)[:, None, None, None]
        return torch.where(chosen, averaged_hessian(now, past, windows), before)

    def _first_behind_start(self, entries: Entries) -> Tensor:
        """(batch,): column of the first entry that may be merged."""
        stored, start = entries.keys.shape[2], self.policy.start
        counts = entries.valid.sum(dim=1)
        return stored - counts + counts.clamp(max=start)

    def _replace(self, entries: Entries) -> None:
        self.held.replace(entries)
        self.windows.counts = entries.valid.sum(dim=1).tolist()

    # -- what the layer is asked ---------------------------------------------------------------------------------

    def attend_entries(self, query: Tensor, scaling: float) -> Tensor:
        keys, values = self.held.keys.view(), self.held.values.view()
        if self._counting():
            return counted_attention(query, keys, values, self.held.cardinalities, scaling)[0]
        return cardinality_attention(query, keys, values, self.held.cardinalities, scaling)

    @property
    def single_tokens(self) -> bool:
        return self.held.cardinalities is None

    def dense(self) -> tuple[Tensor, Tensor]:
        return self.held.keys.view(), self.held.values.view()

    def nbytes_by_part(self) -> dict[str, int]:
        return self.held.nbytes_by_part()

    def fixed_nbytes(self) -> int:
        return 0

    def buffers(self) -> Sequence[RowBuffer]:
        return self.held.all()

    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        self.held.map_batch(select)
