"""What the entries of a layer are, whichever state they are in: still merging, or in the hands of another layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor

from kvgauge.layers.two_phase import TwoPhaseLayer
from kvgauge.methods.merging.positions import NewTokens
from kvgauge.store.rows import RowBuffer
from kvgauge.store.steps import Steps


class LayerEntries(ABC):
    """The entries of one layer in one state.

    A forward pass goes window by window: `look_ahead` may make room, `window_end` says how far, `append` takes the new
    tokens, `attend` looks at all entries, `end_windows` makes room.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Entries of the longest row."""

    # -- a forward pass ------------------------------------------------------------------------------------------

    @abstractmethod
    def look_ahead(self, query: Tensor, keys: Tensor, new: NewTokens, scaling: float) -> None:
        """New tokens are about to be read: make room where their queries decide.

        Args:
            query: (batch, num_attention_heads, tokens, head_dim), of all new tokens that are in no window yet.
            keys: (batch, num_key_value_heads, tokens, head_dim); both at the model's positions.
            new: of these tokens.
            scaling: factor on the scores.
        """

    @abstractmethod
    def window_end(self, begin: int, queries: int, valid: Tensor | None) -> int:
        """Up to which of the new tokens, `begin` the first, the entries stay as they are; at most `queries`."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
        """Add single tokens.

        Args:
            keys, values: (batch, num_key_value_heads, new tokens, head_dim), at running positions.
            valid: (batch, new tokens), False on padding; None where there is none.
        """

    @abstractmethod
    def attend(self, query: Tensor, scaling: float, valid: Tensor | None = None) -> Tensor:
        """The attention output (batch, queries, num_attention_heads, head_dim).

        Args:
            query: (batch, num_attention_heads, queries, head_dim), of the tokens that were appended last.
            scaling: factor on the scores.
            valid: as in `append`.
        """

    @abstractmethod
    def end_windows(self) -> None:
        """Make room in the rows whose window is full."""

    @abstractmethod
    def merges_ahead(self) -> bool:
        """Whether a row will be over its limit when its window ends."""

    @abstractmethod
    def completed(self, successor: Callable[[], TwoPhaseLayer] | None) -> LayerEntries:
        """The context is complete: the entries in their next state.

        Args:
            successor: makes the layer that takes them over; None where they go on merging.
        """

    # -- steps of one shape --------------------------------------------------------------------------------------

    @abstractmethod
    def fix_shapes(self, steps: Steps) -> None:
        """See `kvgauge.layers.cache.KVCache.fix_shapes`."""

    @abstractmethod
    def release_shapes(self, steps: Steps) -> None:
        """See `kvgauge.layers.cache.KVCache.release_shapes`."""

    # -- what the layer is asked ---------------------------------------------------------------------------------

    @abstractmethod
    def attend_entries(self, query: Tensor, scaling: float) -> Tensor:
        """See `kvgauge.layers.cache.LayerCache.attend_entries`."""

    @property
    @abstractmethod
    def single_tokens(self) -> bool:
        """Every entry is one token of its row, and no row is shorter than others."""

    @abstractmethod
    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values of `single_tokens`."""

    @abstractmethod
    def nbytes_by_part(self) -> dict[str, int]:
        """Bytes of the live tensors of all sequences, by what they are for; parts may be 0."""

    @abstractmethod
    def fixed_nbytes(self) -> int:
        """Bytes of what serves every sequence alike."""

    @abstractmethod
    def buffers(self) -> Sequence[RowBuffer]:
        """Every buffer whose first dimension is the batch."""

    @abstractmethod
    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        """Apply a selection along the batch."""
