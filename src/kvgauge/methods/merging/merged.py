"""Caches that hold at most a set number of entries, and make room by merging (or evicting) while they are filled.

The prompt is read in windows, whatever the length of the forward passes: a layer's windows depend only on the layers
below, so a layer may pass through all of its windows before the next layer starts. After each window of a sequence's
own tokens, if it has more entries than its limit, the cheapest adjacent pairs behind its first tokens are merged. At no
time does a layer hold more than limit + window entries of a sequence.

Keys stand at running positions: the sums of the cardinalities before them. Without clipping and eviction these are the
model's own positions, and nothing is rotated but what is merged. Causality needs nothing more: entries are merged
only after a window, of tokens that every later query may see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kvgauge.architecture.rotary import Rotary, turn
from kvgauge.attend.counted_attention import cardinality_attention, counted_attention
from kvgauge.attend.mask import Mask
from kvgauge.errors import UserError
from kvgauge.kernels.cpu.operators import compiled_for
from kvgauge.layers.cache import KVCache, LayerCache
from kvgauge.layers.two_phase import TwoPhaseLayer
from kvgauge.methods.merging.frozen_entries import FrozenEntries
from kvgauge.methods.merging.merge_entries import Entries, align, averaged_hessian, current_hessian, evict, merge
from kvgauge.methods.merging.merge_pairs import choose_pairs, pair_costs
from kvgauge.store.buffers import GrowingBuffer


@dataclass(frozen=True)
class MergePolicy:
    """How many entries a layer keeps and how it makes room.

    Attributes:
        name: of the method, for error messages.
        entries: the limit for a context of so many tokens.
        start: first tokens that are never merged.
        window: tokens between merges.
        rule: one of `kvgauge.methods.merging.merge_entries.RULES`, or ``evict``.
        pairs: one of `kvgauge.methods.merging.merge_pairs.PAIRS`.
        gamma: γ of the discount, in entries.
        clip: largest cardinality, or None.
    """

    name: str
    entries: Callable[[int], int]
    start: int
    window: int
    rule: str
    pairs: str
    gamma: float
    clip: int | None


class MergedLayer(LayerCache):
    """One layer of merged entries; see the module docstring.

    Rows are aligned at their last entry. What every row has by itself (entries, tokens since its last merge, ...) are
    lists with one number a row.

    Args:
        policy: limits and rules.
        rotary: of the model.
        freeze: tokens of the context → the layer that takes over the entries once the context is complete; nothing
            merges after that. None: the entries stay here and go on merging.
    """

    is_croppable = False

    def __init__(
        self, policy: MergePolicy, rotary: Rotary, freeze: Callable[[int], TwoPhaseLayer] | None = None
    ) -> None:
        super().__init__()
        self.policy, self.rotary, self.freeze = policy, rotary, freeze
        self._clear()

    def _clear(self) -> None:
        self.keys_buffer, self.values_buffer = GrowingBuffer(), GrowingBuffer()
        self.cardinality_buffer = GrowingBuffer()  # (batch, entries, 1), empty while all are 1
        self.attention_buffer = GrowingBuffer()  # (batch, kv heads, entries, 1), column sums since the last merge
        self.hessian_buffer = GrowingBuffer()  # (batch, kv heads, entries, 1 or head_dim), h_ii; NaN without a past
        self.counts: list[int] = []  # entries
        self.fresh: list[int] = []  # tokens since the row's window began
        self.lags: list[int] = []  # positions that clipping and eviction have taken away
        self.windows: list[int] = []  # windows whose Hessian was taken
        self.limits: list[int] | None = None  # fixed by `compress`
        self.merge_count = 0  # (sequence, kv head, new entry) merges
        self.guard_count = 0  # those of them whose weights had to be replaced
        self.most_entries = 0  # of any row at any time
        self.groups = 1  # query heads of a kv head
        self.frozen: FrozenEntries | None = None
        self._turning: tuple[Tensor, Tensor] | None = None  # by which the lags turn new tokens
        self._incoming: tuple[Tensor, Tensor] | None = None

    def take(self, keys: Tensor, values: Tensor, cardinalities: Tensor, tokens: int) -> None:
        """Hold, in an empty layer, what is left of a context.

        Args:
            keys, values: (batch, num_key_value_heads, entries, head_dim), at their running positions.
            cardinalities: (batch, entries), 1 or more.
            tokens: of the context.
        """
        self.lazy_initialization(keys, values)
        self.logical_length = tokens
        batch, _, entries, _ = keys.shape
        self.counts, self.fresh, self.windows = ([number] * batch for number in (entries, 0, 1))
        self.lags = [tokens - total for total in cardinalities.sum(dim=1).tolist()]
        self.most_entries = entries
        self.keys_buffer.set(keys)
        self.values_buffer.set(values)
        if not bool((cardinalities == 1).all()):
            self.cardinality_buffer.set(cardinalities[..., None])

    # -- the contract of LayerCache ------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            batch = key_states.shape[0]
            self.counts, self.fresh, self.lags, self.windows = ([0] * batch for _ in range(4))
        self.logical_length += key_states.shape[-2]
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
        self.groups = query.shape[1] // keys.shape[1]
        if self.frozen is not None:
            query, keys, valid = self._place(query, keys, slice(None))
            self.frozen.append(keys, values, valid)
            output = self.frozen.attend(query, scaling)
            cache.layer_done(self.index)
            return output
        outputs, begin, queries = [], 0, query.shape[2]
        while begin < queries:
            end = self._window_end(begin, queries)
            part = slice(begin, end)
            outputs.append(self._attend_part(query[:, :, part], keys[:, :, part], values[:, :, part], part, scaling))
            self.end_windows()
            begin = end
        cache.layer_done(self.index)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def compress(self) -> None:
        """Merge down to the limit, give back spare capacity and forget what only the next merge would need."""
        if self.compressed or not self.is_initialized:
            return
        self.limits = self._current_limits(final=True)
        self._make_room([True] * len(self.counts))
        self.fresh = [0] * len(self.fresh)
        self.attention_buffer.clear()
        self.hessian_buffer.clear()
        self._turning = None
        for buffer in self.buffers():
            if len(buffer):
                buffer.set(buffer.view())
        if self.freeze is None:
            self._arrange_for_decoding()
        else:
            keys, values = self.keys_buffer.view(), self.values_buffer.view()
            self.frozen = FrozenEntries(self.freeze(self.logical_length), keys, values, self.cardinalities)
            for buffer in self.buffers():
                buffer.clear()
        self.compressed = True

    def _arrange_for_decoding(self) -> None:
        """Where there is a kernel for it, the tokens of a dimension side by side: single queries read them faster."""
        if not compiled_for(self.keys_buffer.view(), self.values_buffer.view()):
            return
        for name in ("keys_buffer", "values_buffer"):
            arranged = GrowingBuffer(dimension_major=True)
            arranged.set(getattr(self, name).view())
            setattr(self, name, arranged)

    @property
    def owner(self) -> MergingCache:
        assert isinstance(self.cache, MergingCache)
        return self.cache

    @property
    def physical_length(self) -> int:
        if self.frozen is not None:
            return len(self.frozen)
        return max(self.counts, default=0)

    @property
    def cardinalities(self) -> Tensor | None:
        """(batch, entries), 0 where a shorter row has none; None while every entry is one token of every row."""
        return self.cardinality_buffer.view().squeeze(-1) if len(self.cardinality_buffer) else None

    def nbytes_by_part(self) -> dict[str, int]:
        angles = {"angles": sum(part.untyped_storage().nbytes() for part in self._turning or ())}
        if self.frozen is not None:
            parts = self.frozen.nbytes_by_part() | angles
        else:
            parts = {
                "keys": self.keys_buffer.nbytes(),
                "values": self.values_buffer.nbytes(),
                "cardinalities": self.cardinality_buffer.nbytes(),
                "statistics": self.attention_buffer.nbytes() + self.hessian_buffer.nbytes(),
            } | angles
        return {part: size for part, size in parts.items() if size}

    def dense(self) -> tuple[Tensor, Tensor]:
        plain = self.cardinalities is None and (self.frozen is None or not len(self.frozen.cardinalities))
        if self.merge_count or any(self.lags) or not plain:
            raise UserError(
                f"{self.policy.name} has merged or evicted entries: they no longer stand for single tokens, "
                f"so there are no dense keys and values"
            )
        if self.frozen is not None:
            return self.frozen.layer.dense()
        return self.keys_buffer.view(), self.values_buffer.view()

    def fixed_nbytes(self) -> int:
        return 0 if self.frozen is None else self.frozen.layer.fixed_nbytes()

    def buffers(self) -> Sequence[GrowingBuffer]:
        return (
            self.keys_buffer,
            self.values_buffer,
            self.cardinality_buffer,
            self.attention_buffer,
            self.hessian_buffer,
        )

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise UserError(f"{self.policy.name} cannot be cropped: merged entries cannot be taken apart")

    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        super().map_batch(select)
        self._turning = None
        if self.frozen is not None:
            self.frozen.map_batch(select)
        for name in ("counts", "fresh", "lags", "windows", "limits"):
            numbers = getattr(self, name)
            if numbers:
                setattr(self, name, select(torch.tensor(numbers, device=self.device)).tolist())

    def reset(self) -> None:
        super().reset()
        self._clear()

    # -- windows -------------------------------------------------------------------------------------------------

    def _window_end(self, begin: int, queries: int) -> int:
        """Where the first window of any row ends, or the forward pass."""
        window, new = self.policy.window, self.owner.new_valid
        if new is None:
            return min(queries, begin + window - max(self.fresh))
        fresh = torch.tensor(self.fresh, device=new.device)[:, None] + new[:, begin:].cumsum(dim=1)
        full = (fresh >= window).any(dim=0)
        return begin + int(full.int().argmax()) + 1 if bool(full.any()) else queries

    def _current_limits(self, final: bool = False) -> list[int]:
        """The most entries of each row: by the tokens that are still to come, or in the end by those that came."""
        if self.limits is not None:
            return self.limits
        cache, policy = self.owner, self.policy
        total = self.logical_length if final else max(cache.expected, self.logical_length)
        none = [0] * len(self.counts)
        to_come = none if final or cache.expected_padding is None else cache.expected_padding
        limits = []
        for pads in map(max, cache.pads or none, to_come):
            limit = policy.entries(total - pads)
            if limit <= policy.start and total - pads > limit:
                if final or cache.expected:
                    raise UserError(
                        f"{policy.name} keeps {limit} entries of {total - pads} tokens, and its {policy.start} first "
                        f"tokens stay as they are: lower start, raise the budget or give a longer context"
                    )
                limit = policy.start + 1
            limits.append(limit)
        return limits

    def merge_ahead(self) -> bool:
        """Whether a row will be over its limit when its window ends: only then does anybody ask for column sums."""
        window = self.policy.window
        rows = zip(self.counts, self.fresh, self._current_limits(), strict=True)
        return any(count + window - fresh > limit for count, fresh, limit in rows)

    def attend_entries(self, query: Tensor, scaling: float) -> Tensor:
        """The attention output of one query per head to what is stored, as a step computes it; nothing is noted.

        Args:
            query: (batch, num_attention_heads, 1, head_dim), at running positions.
            scaling: factor on the scores.
        """
        if self.frozen is not None:
            return self.frozen.attend(query, scaling)
        keys, values = self.keys_buffer.view(), self.values_buffer.view()
        if self._counting():
            return counted_attention(query, keys, values, self.cardinalities, scaling)[0]
        return cardinality_attention(query, keys, values, self.cardinalities, scaling)

    def _counting(self) -> bool:
        return self.policy.rule != "evict" and self.merge_ahead()

    def _attend_part(self, query: Tensor, keys: Tensor, values: Tensor, part: slice, scaling: float) -> Tensor:
        counting = self._counting()
        query, keys, valid = self._place(query, keys, part)
        self._append(keys, values, valid)
        all_keys, all_values = self._readable(keys, values)
        if not counting:
            return cardinality_attention(query, all_keys, all_values, self.cardinalities, scaling)
        output, sums = counted_attention(query, all_keys, all_values, self.cardinalities, scaling, valid)
        self._add_attention(sums)
        return output

    def _readable(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, the new ones included, as attention reads them."""
        return self.keys_buffer.view(), self.values_buffer.view()

    def _place(self, query: Tensor, keys: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries and keys of new tokens at their running positions, and which of them are not padding."""
        cache = self.owner
        valid = None if cache.new_valid is None else cache.new_valid[:, part]
        turning = self._turning_of(None if cache.new_lags is None else cache.new_lags[:, part], query)
        if turning is not None:
            both = turn(torch.cat([query, keys], dim=1), turning)  # one after the other took longer at decoding
            query, keys = both.split([query.shape[1], keys.shape[1]], dim=1)
        return query, keys, valid

    def _turning_of(self, new_lags: Tensor | None, query: Tensor) -> tuple[Tensor, Tensor] | None:
        """From the model's positions to the running ones; None where they are the same."""
        if not any(self.lags):
            return None if new_lags is None else self.rotary.turning(new_lags, query)
        lags = torch.tensor(self.lags, device=query.device)[:, None]
        if new_lags is not None:
            return self.rotary.turning(new_lags - lags, query)
        if self._turning is None:  # the same until the next merge
            self._turning = self.rotary.turning(-lags, query)
        return self._turning

    @torch.no_grad()
    def _append(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
        new = keys.shape[2]
        before = len(self.keys_buffer)
        self.keys_buffer.append(keys.detach())
        self.values_buffer.append(values.detach())
        if valid is not None or len(self.cardinality_buffer):
            ones = partial(keys.new_ones, dtype=torch.int32)
            if not len(self.cardinality_buffer) and before:
                self.cardinality_buffer.append(ones((keys.shape[0], before, 1)))
            self.cardinality_buffer.append(ones((keys.shape[0], new, 1)) if valid is None else valid.int()[..., None])
        if len(self.attention_buffer):
            self.attention_buffer.append(self.attention_buffer.view().new_zeros(*keys.shape[:3], 1))
        if len(self.hessian_buffer):
            past = self.hessian_buffer.view()
            self.hessian_buffer.append(past.new_full((*keys.shape[:3], past.shape[-1]), torch.nan))
        added = [new] * len(self.counts) if valid is None else valid.sum(dim=1).tolist()
        interrupted = any(count and more < new for count, more in zip(self.counts, added, strict=True))
        self.counts = [count + more for count, more in zip(self.counts, added, strict=True)]
        self.fresh = [fresh + more for fresh, more in zip(self.fresh, added, strict=True)]
        self.most_entries = max(self.most_entries, *self.counts)
        if interrupted:
            # Padding in front of the new tokens of a row that has entries: they move up to them.
            entries = self._entries([0.0] * len(self.counts))
            self._replace(align(entries, entries.valid))

    def _add_attention(self, sums: Tensor) -> None:
        if len(self.attention_buffer):
            self.attention_buffer.view().squeeze(-1).add_(sums)
        else:
            self.attention_buffer.append(sums.unsqueeze(-1))

    # -- making room ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def end_windows(self) -> None:
        """Merge the rows whose window is full."""
        due = [fresh >= self.policy.window for fresh in self.fresh]
        if not any(due):
            return
        self._make_room(due)
        self.fresh = [0 if ended else fresh for ended, fresh in zip(due, self.fresh, strict=True)]

    @torch.no_grad()
    def _make_room(self, due: list[bool]) -> None:
        limits = self._current_limits()
        rows = zip(due, self.counts, limits, strict=True)
        surplus = [max(0, count - limit) if ended else 0 for ended, count, limit in rows]
        if any(surplus):
            if self.policy.rule == "evict":
                self._evict(surplus)
            else:
                self._merge(surplus)
        if len(self.attention_buffer):
            going_on = self.attention_buffer.view().new_tensor([0.0 if ended else 1.0 for ended in due])
            self.attention_buffer.view().mul_(going_on[:, None, None, None])

    def _evict(self, surplus: list[int]) -> None:
        entries = self._entries([0.0] * len(self.counts))
        removed = torch.tensor(surplus, device=self.device)
        before = entries.cardinalities.sum(dim=1)
        kept = evict(entries, self._first_behind_start(entries.keys.shape[2]), removed, self.rotary)
        self._note_lags(before - kept.cardinalities.sum(dim=1))
        self._replace(kept)

    def _merge(self, surplus: list[int]) -> None:
        policy, wanted = self.policy, torch.tensor(surplus, device=self.device)
        merging = [more > 0 for more in surplus]
        # The attention of rows that do not merge now stays a sum, that of the others becomes a mean over their queries.
        entries = self._entries(
            [float(fresh) if more else 0.0 for fresh, more in zip(self.fresh, merging, strict=True)]
        )
        entries.hessian = self._present_hessian(entries, torch.tensor(merging, device=self.device))
        while True:
            cost = pair_costs(
                entries.shares, entries.cardinalities, self._first_behind_start(entries.keys.shape[2]), policy.gamma
            )
            pairs = choose_pairs(cost, wanted, policy.pairs)
            before = entries.cardinalities.sum(dim=1)
            entries, merges, guarded = merge(entries, pairs, policy.rule, policy.clip, self.rotary)
            self._note_lags(before - entries.cardinalities.sum(dim=1))
            self.merge_count += int(merges.sum())
            self.guard_count += int(guarded.sum())
            self.counts = entries.valid.sum(dim=1).tolist()
            wanted = wanted - pairs.sum(dim=1)
            # Disjoint pairs at most halve a row: what is still over its limit goes another round.
            if not bool((wanted > 0).any()):
                break
        self._replace(entries)

    def _present_hessian(self, entries: Entries, merging: Tensor) -> Tensor | None:
        """The diagonal h_ii of the rows that merge now, averaged over their windows; the others' stays as it is."""
        if self.policy.rule != "hessian":
            return None
        self.windows = [count + int(more) for count, more in zip(self.windows, merging.tolist(), strict=True)]
        windows = torch.tensor(self.windows, device=self.device).clamp(min=1)
        now = current_hessian(entries)
        past = self.hessian_buffer.view() if len(self.hessian_buffer) else None
        before = torch.full_like(now, torch.nan) if past is None else past
        return torch.where(merging[:, None, None, None], averaged_hessian(now, past, windows), before)

    def _first_behind_start(self, stored: int) -> Tensor:
        """(batch,): column of the first entry that may be merged, of `stored` columns."""
        firsts = [stored - count + min(self.policy.start, count) for count in self.counts]
        return torch.tensor(firsts, device=self.device)

    def _entries(self, queries: Sequence[float]) -> Entries:
        """What is stored.

        Args:
            queries: of each row, by which its column sums are divided; an entry younger than that was seen by fewer. 0
                leaves the sums as they are.
        """
        stored = len(self.keys_buffer)
        keys, values = self.keys_buffer.view(), self.values_buffer.view()
        cardinalities = self.cardinalities
        if cardinalities is None:
            cardinalities = torch.ones(keys.shape[0], stored, dtype=torch.int32, device=keys.device)
        if len(self.attention_buffer):
            sums = self.attention_buffer.view().squeeze(-1)
        else:
            sums = keys.new_zeros(keys.shape[:3], dtype=torch.promote_types(keys.dtype, torch.float32))
        hessian = self.hessian_buffer.view() if len(self.hessian_buffer) else None
        seen_by = torch.tensor(queries, device=keys.device, dtype=sums.dtype)[:, None]
        age = torch.arange(stored, 0, -1, device=keys.device, dtype=sums.dtype)
        shares = sums / torch.where(seen_by > 0, torch.minimum(age, seen_by) * self.groups, 1.0)[:, None]
        return Entries(keys, values, cardinalities, shares, hessian)

    def _replace(self, entries: Entries) -> None:
        self.keys_buffer.set(entries.keys)
        self.values_buffer.set(entries.values)
        self.counts = entries.valid.sum(dim=1).tolist()
        plain = bool((entries.cardinalities == 1).all())
        self.cardinality_buffer.clear()
        if not plain:
            self.cardinality_buffer.set(entries.cardinalities[..., None])
        if len(self.attention_buffer):
            self.attention_buffer.set(entries.shares[..., None])
        self.hessian_buffer.clear()
        if entries.hessian is not None:
            self.hessian_buffer.set(entries.hessian)

    def _note_lags(self, lost: Tensor) -> None:
        self.lags = [lag + more for lag, more in zip(self.lags, lost.tolist(), strict=True)]
        self._turning = None


class MergingCache(KVCache):
    """A cache of `MergedLayer`s, which know from it how many tokens will come and which of them are padding."""

    def __init__(self, layers: Sequence[MergedLayer], *, context_length: int | None = None) -> None:
        super().__init__(layers, context_length=context_length)
        self.expected = context_length or 0
        self.expected_padding: Sequence[int] | None = None
        self.new_valid: Tensor | None = None  # (batch, new tokens), False on padding; None where there is none
        self.new_lags: Tensor | None = None  # (batch or 1, new tokens): running positions minus the model's; None for 0
        self.pads: list[int] | None = None  # padding of each row so far

    def expect(self, tokens: int, padding: Sequence[int] | None = None) -> None:
        if tokens >= self.expected:
            self.expected, self.expected_padding = tokens, padding

    def adopt(self, source: KVCache) -> None:
        raise UserError("methods that merge while the context is read make their own prefill: they adopt no other")

    def observe(self, query: Tensor, mask: Mask, position_ids: Tensor | None) -> None:
        super().observe(query, mask, position_ids)
        queries, total = query.shape[2], self.get_seq_length()
        assert self.positions is not None
        positions = self.positions[:, -queries:]
        running = torch.arange(total - queries, total, device=query.device)[None]
        self.new_valid, self.pads = None, None
        if self.valid is not None:
            new = self.valid[:, total - queries :]
            padding = (~self.valid).sum(dim=1)
            self.pads = padding.tolist()
            running = running - (padding - (~new).sum(dim=1))[:, None] - (~new).cumsum(dim=1)
            if not bool(new.all()):
                self.new_valid, running = new, torch.where(new, running, positions)
        lags = running - positions
        self.new_lags = lags if bool(lags.any()) else None

    def _map_records(self, select: Callable[[Tensor], Tensor]) -> None:
        super()._map_records(select)
        for name in ("pads", "expected_padding"):
            numbers = getattr(self, name)
            if numbers is not None:
                setattr(self, name, select(torch.tensor(numbers)).tolist())

    @property
    def merge_counts(self) -> list[int]:
        """Of each layer: merges so far, one for every sequence, kv-head and new entry."""
        return [layer.merge_count for layer in self.layers]

    @property
    def guard_counts(self) -> list[int]:
        """Of each layer: those merges whose quadratic form had no usable minimiser; see `merge_keys.key_weights`."""
        return [layer.guard_count for layer in self.layers]

    def remarks(self) -> dict[str, list[int]]:
        return {"merges": self.merge_counts, "guarded_merges": self.guard_counts}

    def reset(self) -> None:
        super().reset()
        self.expected, self.expected_padding = self.context_length or 0, None
        self.new_valid = self.new_lags = self.pads = None
