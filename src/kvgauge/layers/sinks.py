"""The first tokens of every sequence, exact, in front of whatever the others become."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvgauge.attend.mask import Mask
from kvgauge.errors import UserError
from kvgauge.layers.stored import StoredSegment
from kvgauge.store.storage import EXACT, Kept, Storage


class ExactSinks:
    """Attention sinks: the first tokens of a context.

    Without padding they are cut off the context. In a padded batch every row's sinks are its own first tokens behind
    its padding: they are gathered, the others keep their columns, and the mask hides the sinks' columns there.

    Args:
        limit: how many there are at most.
        storage: of them.
        spare: tokens of every row that are left to the others, however short it is.
        grows: tokens after a context that was too short for all sinks become sinks too, see `grow`.
    """

    def __init__(self, limit: int, storage: Storage = EXACT, *, spare: int = 0, grows: bool = False) -> None:
        self.limit, self.spare, self.grows = limit, spare, grows
        self.keys, self.values = storage.kept(step=1), storage.kept(step=1)
        self.num_heads = 0  # kv-heads, known with the first tokens
        # (batch, sinks): where they stand, if rows are padded; at the end of all columns or behind it: not there yet
        self.columns: Tensor | None = None
        self._complete = False  # nothing is left to grow

    def take(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Copy the sinks of a context.

        Args:
            keys, values: (batch, num_key_value_heads, tokens, head_dim).
            valid: (batch, tokens or more), False on padding, which comes first; None where there is none.

        Returns:
            Keys and values of the columns that are left, and which of them are neither padding nor sinks, or None where
            all are.
        """
        tokens = keys.shape[2]
        self.columns, self.num_heads, self._complete = None, keys.shape[1], not self.grows
        valid = None if valid is None else valid[:, :tokens]
        count = max(0, min(self.limit, tokens - self.spare))
        if valid is None:
            if count:
                self.keys.set(keys[:, :, :count])
                self.values.set(values[:, :, :count])
            return keys[:, :, count:], values[:, :, count:], None
        if not count:
            return keys, values, valid
        lengths = valid.sum(dim=1, keepdim=True)
        slots = torch.arange(count, device=keys.device)
        columns = tokens - lengths + slots
        # A row too short for all its sinks fills up with its first column, which is padding there and never seen.
        self.columns = columns if self.grows else torch.where(slots < lengths - self.spare, columns, 0)
        places = self._places(tokens)
        index = _index(places, keys)
        self.keys.set(keys.gather(2, index))
        self.values.set(values.gather(2, index))
        return keys, values, valid.scatter(1, places, False)

    def grow(self, keys: Tensor, values: Tensor, column: int) -> int:
        """Copy what is a sink among new tokens, the first of them at `column`; how many leading ones are cut off."""
        if self._complete:
            return 0
        if self.columns is None:
            room = max(0, min(self.limit - column, keys.shape[2]))
            if room:
                self.keys.append(keys[:, :, :room])
                self.values.append(values[:, :, :room])
            self._complete = column + room >= self.limit
            return room
        end = column + keys.shape[2]
        slots = torch.arange(min(self.limit, end), device=keys.device)
        self.columns = self.columns[:, :1] + slots
        fresh = (self.columns >= column) & (self.columns < end)
        index = _index((self.columns - column).clamp(0, keys.shape[2] - 1), keys)
        for buffer, new in ((self.keys, keys), (self.values, values)):
            buffer.set(torch.where(fresh[:, None, :, None], new.gather(2, index), _padded(buffer, len(slots))))
        self._complete = len(slots) == self.limit and bool((self.columns < end).all())
        return 0

    def crop(self, tokens: int) -> None:
        """Keep those among the first `tokens` tokens.

        Raises:
            UserError: some would go and could not come back.
        """
        if not self.grows:
            least = len(self) + self.spare if self.columns is None else int(self.columns.max()) + 1
            if len(self) and tokens < least:
                raise UserError(f"cannot crop into the {len(self)} exact sinks: start a new cache")
            return
        self._complete = False
        self.keys.crop(tokens)
        self.values.crop(tokens)
        self.columns = None if self.columns is None else self.columns[:, :tokens]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def cut(self) -> int:
        """Tokens that stand in front of the context's columns: 0 where the columns were gathered."""
        return 0 if self.columns is not None else len(self.keys)

    @property
    def buffers(self) -> tuple[Kept, Kept]:
        """Keys and values."""
        return self.keys, self.values

    def segments(self) -> list[StoredSegment]:
        """The sinks as a segment of attention, or none."""
        return [StoredSegment(self.keys, self.values, self.num_heads)] if len(self.keys) else []

    def mask(self, mask: Mask, queries: int, length: int) -> Mask:
        """The mask of so many queries and tokens in the order of the segments: sinks first."""
        if self.columns is None:
            return mask
        return mask.whole(queries, length, self.columns.device).led_by(self._places(length))

    def restored(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the other tokens with the sinks back in their places."""
        if not len(self.keys):
            return keys, values
        own_keys, own_values = self.keys.dense(), self.values.dense()
        if self.columns is None:
            return torch.cat([own_keys, keys], dim=2), torch.cat([own_values, values], dim=2)
        index = _index(self._places(keys.shape[2]), keys)
        return keys.scatter(2, index, own_keys), values.scatter(2, index, own_values)

    def nbytes(self) -> int:
        return self.keys.nbytes() + self.values.nbytes()

    def map_columns(self, select: Callable[[Tensor], Tensor]) -> None:
        """Apply a selection along the batch to what is not a buffer."""
        if self.columns is not None:
            self.columns = select(self.columns)

    def _places(self, length: int) -> Tensor:
        """The columns, of `length` in all; those that are not there yet are the row's first, which is padding."""
        assert self.columns is not None
        return torch.where(self.columns < length, self.columns, 0)


def _index(columns: Tensor, states: Tensor) -> Tensor:
    """Columns (batch, n) as an index into states (batch, heads, tokens, head_dim)."""
    return columns[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])


def _padded(buffer: Kept, tokens: int) -> Tensor:
    """The rows of a buffer, and zeros up to `tokens` rows."""
    rows = buffer.dense()
    return torch.nn.functional.pad(rows, (0, 0, 0, tokens - rows.shape[-2]))
