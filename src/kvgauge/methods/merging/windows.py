"""The windows of a context: what every row of a layer has by itself, one number a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Windows:
    """Where the rows of a layer stand in their windows, and how many entries each may keep.

    Args:
        window: tokens between merges.
        expected: the most entries of each row, as far as that is known while the context is read.

    Attributes:
        counts: entries.
        fresh: tokens since the row's window began.
        taken: windows whose Hessian was taken.
        fixed: the limits once the context is complete; None before.
        upto: tokens of each row when its window ends; None where the limits do not grow with the answer.
    """

    def __init__(self, window: int, expected: Callable[[], list[int]]) -> None:
        self.window, self._expected = window, expected
        self.counts: list[int] = []
        self.fresh: list[int] = []
        self.taken: list[int] = []
        self.fixed: list[int] | None = None
        self.upto: list[int] | None = None
        self._limit: Callable[[int], int] | None = None

    def begin(self, batch: int, entries: int = 0, taken: int = 0) -> None:
        """The first window of `batch` rows, which have so many entries and Hessians from before."""
        self.counts, self.fresh, self.taken = ([number] * batch for number in (entries, 0, taken))

    def go_on(self, window: int, tokens: Sequence[int], limit: Callable[[int], int]) -> None:
        """The context is complete, and every row has a window of `window` tokens before it.

        Args:
            window: tokens between merges from here on.
            tokens: of each row so far.
            limit: the most entries of a row of so many tokens.
        """
        self.window, self.upto, self._limit = window, [count + window for count in tokens], limit
        self.fixed = [limit(count) for count in self.upto]

    @property
    def grows(self) -> bool:
        """The limits grow with the answer."""
        return self.upto is not None

    @property
    def limits(self) -> list[int]:
        """The most entries of each row."""
        return self._expected() if self.fixed is None else self.fixed

    def end(self, begin: int, queries: int, valid: Tensor | None) -> int:
        """Where the first window of any row ends, or the forward pass.

        Args:
            begin: the first of the new tokens that is in no window yet.
            queries: new tokens.
            valid: (batch, queries), False on padding; None where there is none.
        """
        if valid is None:
            return min(queries, begin + self.window - max(self.fresh))
        fresh = torch.tensor(self.fresh, device=valid.device)[:, None] + valid[:, begin:].cumsum(dim=1)
        full = (fresh >= self.window).any(dim=0)
        return begin + int(full.int().argmax()) + 1 if bool(full.any()) else queries

    def interrupted(self, added: Sequence[int], new: int) -> bool:
        """Of `new` columns some are padding between a row's entries and the tokens that it gets, `added` in number."""
        return any(count and more < new for count, more in zip(self.counts, added, strict=True))

    def add(self, added: Sequence[int]) -> None:
        """Every row gets so many tokens."""
        self.counts = [count + more for count, more in zip(self.counts, added, strict=True)]
        self.fresh = [fresh + more for fresh, more in zip(self.fresh, added, strict=True)]

    def due(self) -> list[bool]:
        """Whose window is full."""
        return [fresh >= self.window for fresh in self.fresh]

    def begins(self, valid: Tensor | None) -> list[bool]:
        """Whose next window begins with new tokens, `valid` (batch, tokens) of them; None: all are."""
        if valid is None:
            return self.due()
        return [full and some for full, some in zip(self.due(), valid.any(dim=1).tolist(), strict=True)]

    def restart(self, due: Sequence[bool]) -> None:
        """A new window begins in these rows."""
        self.fresh = [0 if ended else fresh for ended, fresh in zip(due, self.fresh, strict=True)]
        if self.upto is not None and self._limit is not None:
            self.upto = [count + self.window * int(ended) for ended, count in zip(due, self.upto, strict=True)]
            self.fixed = [self._limit(count) for count in self.upto]

    def surplus(self, due: Sequence[bool]) -> list[int]:
        """How many entries are too many, in rows whose window is over."""
        rows = zip(due, self.counts, self.limits, strict=True)
        return [max(0, count - limit) if ended else 0 for ended, count, limit in rows]

    def merges_ahead(self) -> bool:
        """Whether a row will be over its limit when its window ends."""
        rows = zip(self.counts, self.fresh, self.limits, strict=True)
        return any(count + self.window - fresh > limit for count, fresh, limit in rows)

    def take(self, rows: Sequence[bool]) -> None:
        """The Hessian of these rows is taken once more."""
        self.taken = [count + int(more) for count, more in zip(self.taken, rows, strict=True)]

    # -- batches -------------------------------------------------------------------------------------------------

    def map_batch(self, select: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Apply a selection along the batch."""

        def chosen(numbers: list[int]) -> list[int]:
            return select(torch.tensor(numbers, device=device)).tolist() if numbers else numbers

        self.counts, self.fresh, self.taken = map(chosen, (self.counts, self.fresh, self.taken))
        self.fixed = None if self.fixed is None else chosen(self.fixed)
        self.upto = None if self.upto is None else chosen(self.upto)

    def hold_row(self, source: Windows, index: int) -> None:
        """Be one row of `source`."""
        self.counts, self.fresh, self.taken = (
            [numbers[index]] for numbers in (source.counts, source.fresh, source.taken)
        )
        self.fixed = None if source.fixed is None else [source.fixed[index]]
        self.upto = None if source.upto is None else [source.upto[index]]
        self.window, self._limit = source.window, source._limit

    def hold_rows(self, rows: Sequence[Windows]) -> None:
        """Be `rows`, of one row each, in the place of what was; limits stay."""
        self.counts, self.fresh, self.taken = (
            [numbers[0] for numbers in several]
            for several in zip(*((row.counts, row.fresh, row.taken) for row in rows), strict=True)
        )
        if self.upto is not None:
            self.upto = [row.upto[0] for row in rows if row.upto is not None]
            self.fixed = [row.fixed[0] for row in rows if row.fixed is not None]
