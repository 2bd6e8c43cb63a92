"""Entries that make room for others: merged, or evicted, whenever a window ends with too many of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvgauge.attend.counted_attention import cardinality_attention, counted_attention
from kvgauge.layers.two_phase import TwoPhaseLayer
from kvgauge.methods.merging.entry_buffers import EntryBuffers
from kvgauge.methods.merging.frozen_entries import FrozenEntries
from kvgauge.methods.merging.layer_entries import LayerEntries
from kvgauge.methods.merging.merge_entries import Entries, align, averaged_hessian, current_hessian, evict, merge
from kvgauge.methods.merging.merge_pairs import choose_pairs, pair_costs
from kvgauge.methods.merging.policy import MergePolicy
from kvgauge.methods.merging.positions import RunningPositions
from kvgauge.methods.merging.tally import Tally
from kvgauge.methods.merging.windows import Windows
from kvgauge.store.rows import RowBuffer


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
        self.held = EntryBuffers()
        self.groups = 1  # query heads of a kv-head

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

    def window_end(self, begin: int, queries: int, valid: Tensor | None) -> int:
        return self.windows.end(begin, queries, valid)

    @torch.no_grad()
    def append(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
        self.held.append(keys.detach(), values.detach(), valid)
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
        return not self.policy.evicts and self.merges_ahead()

    def merges_ahead(self) -> bool:
        return self.windows.merges_ahead()

    @torch.no_grad()
    def end_windows(self) -> None:
        due = self.windows.due()
        if any(due):
            self.make_room(due)
            self.windows.restart(due)

    def completed(self, successor: Callable[[], TwoPhaseLayer] | None) -> LayerEntries:
        everywhere = [True] * len(self.windows.counts)
        self.make_room(everywhere)
        self.windows.restart(everywhere)
        self.held.settle()
        self.positions.forget()
        if successor is None:
            self.held.arrange_for_decoding()
            return self
        return FrozenEntries(successor(), *self.readable(), self.held.cardinalities)

    # -- making room ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def make_room(self, due: Sequence[bool]) -> None:
        """Bring the rows whose window is over down to their limits."""
        surplus = self.windows.surplus(due)
        if any(surplus):
            if self.policy.evicts:
                self._evict(surplus)
            else:
                self._merge(surplus)
        self.held.restart_attention(due)

    def _evict(self, surplus: Sequence[int]) -> None:
        entries = self.held.read([0.0] * len(surplus), self.groups)
        removed = torch.tensor(surplus, device=entries.keys.device)
        before = entries.cardinalities.sum(dim=1)
        kept = evict(entries, self._first_behind_start(entries), removed, self.positions.rotary)
        self.positions.add(before - kept.cardinalities.sum(dim=1))
        self._replace(kept)

    def _merge(self, surplus: Sequence[int]) -> None:
        policy, merging = self.policy, [more > 0 for more in surplus]
        # The attention of rows that do not merge now stays a sum, that of the others becomes a mean over their queries.
        rows = zip(self.windows.fresh, merging, strict=True)
        entries = self.held.read([float(fresh) if more else 0.0 for fresh, more in rows], self.groups)
        entries.hessian = self.present_hessian(entries, merging)
        wanted = torch.tensor(surplus, device=entries.keys.device)
        while True:
            cost = pair_costs(entries.shares, entries.cardinalities, self._first_behind_start(entries), policy.gamma)
            pairs = choose_pairs(cost, wanted, policy.pairs)
            before = entries.cardinalities.sum(dim=1)
            entries, merges, guarded = merge(entries, pairs, policy.rule, policy.clip, self.positions.rotary)
            self.positions.add(before - entries.cardinalities.sum(dim=1))
            self.tally.merges += int(merges.sum())
            self.tally.guarded += int(guarded.sum())
            self.windows.counts = entries.valid.sum(dim=1).tolist()
            wanted = wanted - pairs.sum(dim=1)
            # Disjoint pairs at most halve a row: what is still over its limit goes another round.
            if not bool((wanted > 0).any()):
                break
        self._replace(entries)

    def present_hessian(self, entries: Entries, merging: Sequence[bool]) -> Tensor | None:
        """The diagonal h_ii of the rows that merge now, averaged over their windows; the others' stays as it is."""
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
        firsts = [stored - count + min(start, count) for count in self.windows.counts]
        return torch.tensor(firsts, device=entries.keys.device)

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
