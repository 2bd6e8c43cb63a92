"""The entries of one layer as tensors that grow: keys, values, cardinalities, and what the next merge will need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from kvgauge.kernels.cpu.operators import compiled_for
from kvgauge.methods.merging.merge_entries import Entries
from kvgauge.store.buffers import GrowingBuffer
from kvgauge.store.steps import Steps


class EntryBuffers:
    """Rows are aligned at their last entry; shorter ones have empty places in front, of cardinality 0.

    Attributes:
        keys, values: (batch, num_key_value_heads, entries, head_dim).
        counts: (batch, entries, 1), tokens of an entry; empty while all are 1.
        attention: (batch, num_key_value_heads, entries, 1), column sums since the last merge; empty before any.
        hessian: (batch, num_key_value_heads, entries, 1 or head_dim), h_ii; NaN without a past, empty before any.
        at_end: entries stand at their last token, see `Entries`.
    """

    def __init__(self, *, at_end: bool = False) -> None:
        self.at_end = at_end
        self.keys, self.values = GrowingBuffer(), GrowingBuffer()
        self.counts, self.attention, self.hessian = GrowingBuffer(), GrowingBuffer(), GrowingBuffer()

    def __len__(self) -> int:
        return len(self.keys)

    def all(self) -> Sequence[GrowingBuffer]:
        return (self.keys, self.values, self.counts, self.attention, self.hessian)

    @property
    def cardinalities(self) -> Tensor | None:
        """(batch, entries), 0 where a shorter row has none; None while every entry is one token of every row."""
        return self.counts.view().squeeze(-1) if len(self.counts) else None

    def set(self, keys: Tensor, values: Tensor, cardinalities: Tensor) -> None:
        """Replace keys, values and cardinalities (batch, entries)."""
        self.keys.set(keys)
        self.values.set(values)
        self.counts.clear()
        if not bool((cardinalities == 1).all()):
            self.counts.set(cardinalities[..., None])

    def append(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
        """Add single tokens, shaped as `keys` and `values`; `valid` (batch, new tokens) is False on padding."""
        before, shape = len(self), keys.shape[:3]
        self.keys.append(keys)
        self.values.append(values)
        if valid is not None or len(self.counts):
            ones = partial(keys.new_ones, dtype=torch.int32)
            if not len(self.counts) and before:
                self.counts.append(ones((shape[0], before, 1)))
            self.counts.append(ones((shape[0], shape[2], 1)) if valid is None else valid.int()[..., None])
        if len(self.attention):
            self.attention.append(self.attention.view().new_zeros(*shape, 1))
        if len(self.hessian):
            past = self.hessian.view()
            self.hessian.append(past.new_full((*shape, past.shape[-1]), torch.nan))

    def fix(self, steps: Steps, counting: bool) -> None:
        """See `kvgauge.store.rows.RowBuffer.fix`; places that are still empty have cardinality 0.

        Args:
            steps: of the cache.
            counting: column sums will be added.
        """
        keys = self.keys.view()
        if not len(self.counts):
            self.counts.append(keys.new_ones(keys.shape[0], len(self), 1, dtype=torch.int32))
        if counting and not len(self.attention):
            self.attention.append(
                keys.new_zeros(*keys.shape[:3], 1, dtype=torch.promote_types(keys.dtype, torch.float32))
            )
        for buffer in self._held():
            buffer.fix(steps)

    def release(self, steps: Steps) -> None:
        """See `kvgauge.store.rows.RowBuffer.release`."""
        for buffer in self._held():
            buffer.release(steps)

    def _held(self) -> Sequence[GrowingBuffer]:
        return [buffer for buffer in self.all() if len(buffer)]

    # -- what merges need ----------------------------------------------------------------------------------------

    def add_attention(self, sums: Tensor) -> None:
        """Column sums (batch, num_key_value_heads, entries) of more queries."""
        if len(self.attention):
            self.attention.view().squeeze(-1).add_(sums)
        else:
            self.attention.append(sums.unsqueeze(-1))

    def restart_attention(self, due: Sequence[bool]) -> None:
        """Begin the column sums of these rows anew."""
        if len(self.attention):
            going_on = self.attention.view().new_tensor([0.0 if ended else 1.0 for ended in due])
            self.attention.view().mul_(going_on[:, None, None, None])

    def past_hessian(self) -> Tensor | None:
        """What earlier windows left; None before any."""
        return self.hessian.view() if len(self.hessian) else None

    def read(self, queries: Sequence[float], groups: int) -> Entries:
        """What is stored.

        Args:
            queries: of each row, by which its column sums are divided; an entry younger than that was seen by fewer. 0
                leaves the sums as they are.
            groups: query heads of a kv-head.
        """
        stored = len(self)
        keys, values = self.keys.view(), self.values.view()
        cardinalities = self.cardinalities
        if cardinalities is None:
            cardinalities = torch.ones(keys.shape[0], stored, dtype=torch.int32, device=keys.device)
        if len(self.attention):
            sums = self.attention.view().squeeze(-1)
        else:
            sums = keys.new_zeros(keys.shape[:3], dtype=torch.promote_types(keys.dtype, torch.float32))
        seen_by = torch.tensor(queries, device=keys.device, dtype=sums.dtype)[:, None]
        age = torch.arange(stored, 0, -1, device=keys.device, dtype=sums.dtype)
        shares = sums / torch.where(seen_by > 0, torch.minimum(age, seen_by) * groups, 1.0)[:, None]
        return Entries(keys, values, cardinalities, shares, self.past_hessian(), self.at_end)

    def replace(self, entries: Entries) -> None:
        """Hold `entries` in the place of what was stored."""
        self.set(entries.keys, entries.values, entries.cardinalities)
        if len(self.attention):
            self.attention.set(entries.shares[..., None])
        self.hessian.clear()
        if entries.hessian is not None:
            self.hessian.set(entries.hessian)

    # -- after the context ---------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Give back spare capacity and forget what only the next merge would need."""
        self.attention.clear()
        self.hessian.clear()
        for buffer in self.all():
            if len(buffer):
                buffer.set(buffer.view())

    def arrange_for_decoding(self) -> None:
        """Where there is a kernel for it, the tokens of a dimension side by side: single queries read them faster."""
        if compiled_for(self.keys.view(), self.values.view()):
            self.keys, self.values = _side_by_side(self.keys), _side_by_side(self.values)

    def nbytes_by_part(self) -> dict[str, int]:
        return {
            "keys": self.keys.nbytes(),
            "values": self.values.nbytes(),
            "cardinalities": self.counts.nbytes(),
            "statistics": self.attention.nbytes() + self.hessian.nbytes(),
        }

    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        for buffer in self.all():
            buffer.map_batch(select)

    def clear(self) -> None:
        for buffer in self.all():
            buffer.clear()


def _side_by_side(buffer: GrowingBuffer) -> GrowingBuffer:
    arranged = GrowingBuffer(dimension_major=True)
    arranged.set(buffer.view())
    return arranged
