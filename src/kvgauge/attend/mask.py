"""Who sees what: every kind of attention mask behind one type.

transformers hands attention a tensor of booleans, or nothing where a sequence is plainly causal. Entries that stand for
several tokens weigh as many times as much, and where several queries see different ones of them, their weights are
added to the scores. What is done with a mask is the same for all of them and is said here once; nobody else asks which
kind it is. Tensors are (batch or 1, num_attention_heads or 1, queries, entries).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import Self

from kvgauge.attend.cardinalities import HIDDEN, log_cardinalities


def causal_mask(queries: int, tokens: int, device: torch.device) -> Tensor:
    """(1, 1, queries, tokens), True where a query sees a token; the last query sees the last token."""
    last = torch.arange(tokens - queries, tokens, device=device)
    return (torch.arange(tokens, device=device)[None, :] <= last[:, None])[None, None]


class Mask(ABC):
    """Which entries each query attends to, and how much they weigh.

    Attributes:
        by_head: heads see different entries.
        hides_only: it says what is seen, and how often each entry counts, and adds nothing else to the scores.
    """

    by_head: bool = False
    hides_only: ClassVar[bool] = True

    @staticmethod
    def of(given: Tensor | None) -> Mask:
        """What transformers hands to an attention function.

        Args:
            given: True where a query sees a token, or floating point: added to the scores; None for plain causal.
        """
        if given is None:
            return CAUSAL
        return Added(given) if given.is_floating_point() else Seen(given.bool())

    @staticmethod
    def of_entries(cardinalities: Tensor | None, queries: int, dtype: torch.dtype) -> Mask:
        """Causal attention to entries that stand for several tokens; the last ones are the queries' own.

        Args:
            cardinalities: (batch, entries), tokens of an entry, 0 where a shorter row has none; None while all are 1.
            queries: of one head.
            dtype: of the queries.
        """
        if cardinalities is None:
            return CAUSAL
        counts = cardinalities[:, None, None]
        if queries == 1:
            return Counts(counts)
        later = torch.ones(queries, queries, dtype=torch.bool, device=cardinalities.device).triu(1)
        bias = log_cardinalities(counts, dtype)
        return Added(bias.masked_fill(functional.pad(later, (cardinalities.shape[1] - queries, 0)), HIDDEN))

    # -- what attention needs ------------------------------------------------------------------------------------

    @abstractmethod
    def to(self, device: torch.device) -> Mask:
        """The same on a device."""

    @abstractmethod
    def whole(self, queries: int, entries: int, device: torch.device) -> TensorMask:
        """The same, spelt out for every query and entry."""

    @abstractmethod
    def spread(self, queries: int) -> Mask:
        """The same for so many queries, more than one, of which `block` takes some; no larger than it was."""

    @abstractmethod
    def block(self, start: int, stop: int, entries: int) -> Mask:
        """Queries from `start` to `stop`, and the first `entries` entries; several come of a mask that is `spread`."""

    @abstractmethod
    def apply_(self, scores: Tensor) -> None:
        """Hide and weigh entries in the scores (batch, heads, queries, entries), in place.

        For one query the third dimension may be anything that all queries in it share. Several need a mask that is
        `spread`.
        """

    @abstractmethod
    def bias(self, query: Tensor, entries: int) -> Tensor | None:
        """What scaled dot product attention takes: booleans, or what it adds to the scores.

        None where there is nothing but the causal order, aligned at the last entry: from one query all are seen.

        Args:
            query: (batch, num_attention_heads, queries, head_dim).
            entries: of the keys.
        """

    @abstractmethod
    def seen_by_last(self, entries: int) -> Tensor | None:
        """(batch or 1, entries), True where the last query, which is no padding, sees an entry; None: all."""

    # -- the masks of one query ----------------------------------------------------------------------------------

    @abstractmethod
    def row(self, batch: int, entries: int) -> Tensor | None:
        """What compiled kernels take of one query: (batch, entries), see `kvgauge.kernels.cpu.decode_attention`.

        None hides nothing. Only of masks that hide only, and the same in every head.
        """

    @abstractmethod
    def split(self, entries: Sequence[int]) -> Sequence[Mask]:
        """Of runs of so many entries, in their order."""

    @abstractmethod
    def picked(self, columns: Tensor) -> Mask:
        """Of the entries in `columns` (batch, heads, n), which differ from head to head."""

    # -- entries that stand elsewhere ----------------------------------------------------------------------------

    @abstractmethod
    def behind(self, start: int) -> Mask:
        """Of the entries from `start` on."""

    @abstractmethod
    def replaced(self, start: int, stop: int, entries: int) -> Mask:
        """With `entries` that every query sees in the place of those from `start` to `stop`, all before the queries."""


@dataclass(frozen=True)
class Causal(Mask):
    """Every query sees all entries up to its own, the last query all: from a single query nothing is hidden."""

    def to(self, device: torch.device) -> Mask:
        return self

    def whole(self, queries: int, entries: int, device: torch.device) -> TensorMask:
        return Seen(causal_mask(queries, entries, device))

    def spread(self, queries: int) -> Mask:
        return CausalQueries(queries)

    def block(self, start: int, stop: int, entries: int) -> Mask:
        return self

    def apply_(self, scores: Tensor) -> None:
        pass

    def bias(self, query: Tensor, entries: int) -> Tensor | None:
        return None

    def seen_by_last(self, entries: int) -> Tensor | None:
        return None

    def row(self, batch: int, entries: int) -> Tensor | None:
        return None

    def split(self, entries: Sequence[int]) -> Sequence[Mask]:
        return [self] * len(entries)

    def picked(self, columns: Tensor) -> Mask:
        return self

    def behind(self, start: int) -> Mask:
        return self

    def replaced(self, start: int, stop: int, entries: int) -> Mask:
        return self


CAUSAL = Causal()


@dataclass(frozen=True)
class CausalQueries(Causal):
    """The same for a run of several queries.

    Attributes:
        queries: of the run.
        later: queries behind it; theirs are the last entries.
    """

    queries: int
    later: int = 0

    def spread(self, queries: int) -> Mask:
        return self

    def block(self, start: int, stop: int, entries: int) -> Mask:
        return CausalQueries(stop - start, self.later + self.queries - stop)

    def apply_(self, scores: Tensor) -> None:
        own, entries = scores.shape[2], scores.shape[3]
        hidden = torch.ones(own, own + self.later, dtype=torch.bool, device=scores.device).triu(1)
        last = scores[..., entries - own - self.later :]
        last.masked_fill_(hidden, torch.finfo(scores.dtype).min)


@dataclass(frozen=True)
class TensorMask(Mask):
    """A mask that is spelt out.

    Attributes:
        tensor: (batch or 1, num_attention_heads or 1, queries, entries or more).
    """

    tensor: Tensor

    neutral: ClassVar[float] = True
    """What leaves an entry as it is."""

    @property
    @abstractmethod
    def hiding(self) -> float:
        """What hides an entry."""

    @property
    def by_head(self) -> bool:  # type: ignore[override]
        return self.tensor.shape[1] != 1

    def to(self, device: torch.device) -> Self:
        return self if self.tensor.device == device else type(self)(self.tensor.to(device))

    def whole(self, queries: int, entries: int, device: torch.device) -> TensorMask:
        return self

    def spread(self, queries: int) -> Mask:
        return self

    def block(self, start: int, stop: int, entries: int) -> Self:
        if stop - start == self.tensor.shape[2] and entries == self.tensor.shape[3]:
            return self
        return type(self)(self.tensor[:, :, start:stop, :entries])

    def row(self, batch: int, entries: int) -> Tensor | None:
        return self.tensor[:, 0, 0, :entries].expand(batch, -1)

    def split(self, entries: Sequence[int]) -> Sequence[Mask]:
        if len(entries) == 1:
            return [self]
        parts = self.block(0, 1, sum(entries)).tensor.split(list(entries), dim=-1)
        return [type(self)(part) for part in parts]

    def picked(self, columns: Tensor) -> Mask:
        row = self.tensor[:, :, 0].expand(*columns.shape[:2], -1)
        return type(self)(row.gather(2, columns)[:, :, None])

    def behind(self, start: int) -> Self:
        return type(self)(self.tensor[..., start:]) if start else self

    def replaced(self, start: int, stop: int, entries: int) -> Mask:
        later = functional.pad(self.tensor[..., stop:], (entries, 0), value=self.neutral)
        return type(self)(torch.cat([self.tensor[..., :start], later], dim=-1) if start else later)

    def led_by(self, columns: Tensor) -> Mask:
        """With the entries in `columns` (batch, n) in front of all, and hidden where they stood."""
        tensor = self.tensor.expand(columns.shape[0], -1, -1, -1)
        index = columns[:, None, None].expand(-1, *tensor.shape[1:3], -1)
        return type(self)(torch.cat([tensor.gather(3, index), tensor.scatter(3, index, self.hiding)], dim=3))

    def led_by_seen(self, seen: Tensor) -> Mask:
        """With more entries in front, True in `seen` (batch, heads, n) where all queries of a head see them."""
        batch, heads, _ = seen.shape
        mine = self.tensor.expand(batch, heads, -1, -1)
        first = self._saying(seen)[:, :, None].expand(-1, -1, mine.shape[2], -1)
        return type(self)(torch.cat([first, mine], dim=-1))

    def _saying(self, seen: Tensor) -> Tensor:
        return torch.where(seen, self.neutral, self.hiding).to(self.tensor.dtype)


@dataclass(frozen=True)
class Seen(TensorMask):
    """True where a query sees an entry."""

    @property
    def hiding(self) -> float:
        return False

    def apply_(self, scores: Tensor) -> None:
        scores.masked_fill_(~self.tensor, torch.finfo(scores.dtype).min)

    def bias(self, query: Tensor, entries: int) -> Tensor | None:
        return self.block(0, query.shape[2], entries).tensor

    def seen_by_last(self, entries: int) -> Tensor | None:
        return self.tensor[:, 0, -1, :entries]


@dataclass(frozen=True)
class Counts(TensorMask):
    """How many tokens an entry stands for, int32, 0 for none: the weight of what a single query sees."""

    neutral: ClassVar[float] = 1

    @property
    def hiding(self) -> float:
        return 0

    def apply_(self, scores: Tensor) -> None:
        scores.add_(log_cardinalities(self.tensor, scores.dtype))

    def bias(self, query: Tensor, entries: int) -> Tensor | None:
        return log_cardinalities(self.block(0, 1, entries).tensor, query.dtype)

    def seen_by_last(self, entries: int) -> Tensor | None:
        return self.tensor[:, 0, -1, :entries] > 0


@dataclass(frozen=True)
class Added(TensorMask):
    """Floating point, added to the scores."""

    hides_only: ClassVar[bool] = False
    neutral: ClassVar[float] = 0.0

    @property
    def hiding(self) -> float:
        return torch.finfo(self.tensor.dtype).min

    def apply_(self, scores: Tensor) -> None:
        scores.add_(self.tensor)

    def bias(self, query: Tensor, entries: int) -> Tensor | None:
        return self.block(0, query.shape[2], entries).tensor

    def seen_by_last(self, entries: int) -> Tensor | None:
        return self.tensor[:, 0, -1, :entries] > max(HIDDEN, self.hiding)
