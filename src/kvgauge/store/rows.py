"""What every buffer of a cache can do with its rows, in whatever form it keeps them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kvgauge.errors import UserError
from kvgauge.kernels.cpu.stored_rows import StoredRows
from kvgauge.store.steps import Steps


class RowBuffer(ABC):
    """Rows along the second-to-last dimension, e.g. (batch, heads, tokens, dimension), one per token.

    Attention needs two products of them: `dot` with queries and `mix` with weights. Buffers that keep something
    smaller than the rows make them block by block on the way, and never all at once.
    """

    @property
    def together(self) -> int:
        """Rows that are compressed together: fewer of them wait."""
        return 1

    # -- content -------------------------------------------------------------------------------------------------

    @abstractmethod
    def append(self, rows: Tensor) -> None:
        """Add rows (…, new tokens, dimension)."""

    @abstractmethod
    def set(self, rows: Tensor, valid: Tensor | None = None) -> None:
        """Replace the content by `rows`, with no spare capacity and no storage shared with anything larger.

        Args:
            rows: (batch, …, tokens, dimension).
            valid: (batch, tokens), False on padding, which must have no part in what is learnt from the rows; None
                where there is none.
        """

    @abstractmethod
    def take(self, stored: Tensor, valid: Tensor | None = None) -> None:
        """Replace the content by a tensor in the layout of the storage, which the caller gives up; `valid` as `set`."""

    @abstractmethod
    def reserve(self, tokens: int) -> None:
        """Capacity for `tokens` tokens in all, at the next append at the latest."""

    @abstractmethod
    def trim(self) -> None:
        """Give back spare capacity."""

    @abstractmethod
    def crop(self, tokens: int) -> None:
        """Keep the first `tokens` rows.

        Raises:
            UserError: rows that share something cannot be taken apart there.
        """

    def room(self) -> int:
        """Rows that `append` can add and `crop` take back without a trace, 0 where that is not sure."""
        return 0

    def fix(self, steps: Steps) -> None:
        """Take room for `steps.room` more rows at once: from now on an append writes one row, and no shape changes.

        The buffer is then as long as it will be, with zeros where nothing has been written: whoever reads it hides
        them.

        Raises:
            UserError: rows of this kind change their shape as they come.
        """
        raise UserError(f"{type(self).__name__} change their shape as tokens come: their decode steps are no one graph")

    def release(self, steps: Steps) -> None:
        """Be as long as what was written, and grow again."""
        raise UserError(f"{type(self).__name__} were not fixed")

    @abstractmethod
    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        """Apply `select` to everything stored: reorder, repeat or pick sequences of the batch."""

    @abstractmethod
    def clear(self) -> None:
        """Free the storage."""

    @abstractmethod
    def __len__(self) -> int:
        """Rows."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the live storage, spare capacity included."""

    # -- reading -------------------------------------------------------------------------------------------------

    @abstractmethod
    def block(self, start: int, stop: int) -> Tensor:
        """The rows from `start` to `stop`, (…, stop − start, dimension), in the dtype they came in."""

    @abstractmethod
    def dot(self, query: Tensor) -> Tensor:
        """``query @ rowsᵀ``: (…, queries, tokens) of queries (…, queries, dimension)."""

    @abstractmethod
    def mix(self, weights: Tensor) -> Tensor:
        """``weights @ rows``: (…, queries, dimension) of weights (…, queries, tokens)."""

    def compiled(self, shared: int = 0) -> list[StoredRows] | None:
        """All rows as compiled kernels read them, in pieces, until the buffer is written to; None where none can.

        Args:
            shared: see `kvgauge.kernels.cpu.stored_rows.plain_rows`.
        """
        return None

    def dense(self) -> Tensor:
        """All rows. For small matrices, and for measuring."""
        return self.block(0, len(self))


class BlockwiseRows(RowBuffer):
    """Rows that are made in blocks of tokens, in one workspace per product.

    Attributes:
        dtype: of the rows that came in, and of those that come out.
    """

    READ = 512  # tokens of a block: with 64 channels and a few heads it stays in a processor's second-level cache

    dtype: torch.dtype

    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """(…, tokens, dimension)."""

    @abstractmethod
    def write(self, start: int, stop: int, out: Tensor) -> None:
        """The rows from `start` to `stop` into `out` (…, stop − start, dimension), without `channel_scale`."""

    def channel_scale(self, dtype: torch.dtype) -> Tensor | None:
        """What every row is multiplied by, (…, 1, dimension); None for nothing. Products apply it once, to a side."""
        return None

    def block(self, start: int, stop: int) -> Tensor:
        *outer, _, dimension = self.shape()
        rows = torch.empty(*outer, stop - start, dimension, dtype=self.dtype, device=self.device)
        self.write(start, stop, rows)
        scale = self.channel_scale(self.dtype)
        return rows if scale is None else rows.mul_(scale)

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Of the storage."""

    def dot(self, query: Tensor) -> Tensor:
        scale = self.channel_scale(query.dtype)
        asked = query if scale is None else query * scale
        scores = query.new_empty(*query.shape[:-1], len(self))
        for start, stop, rows in self._blocks(query.dtype):
            scores[..., start:stop] = asked @ rows.mT
        return scores

    def mix(self, weights: Tensor) -> Tensor:
        exact = torch.promote_types(weights.dtype, torch.float32)  # of sums over many blocks
        mixed = torch.zeros(*weights.shape[:-1], self.shape()[-1], dtype=exact, device=weights.device)
        for start, stop, rows in self._blocks(weights.dtype):
            mixed += weights[..., start:stop] @ rows
        scale = self.channel_scale(exact)
        return (mixed if scale is None else mixed * scale).to(weights.dtype)

    def _blocks(self, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        *outer, tokens, dimension = self.shape()
        workspace = torch.empty(*outer, min(self.READ, tokens), dimension, dtype=dtype, device=self.device)
        for start in range(0, tokens, self.READ):
            stop = min(start + self.READ, tokens)
            rows = workspace[..., : stop - start, :]
            self.write(start, stop, rows)
            yield start, stop, rows
