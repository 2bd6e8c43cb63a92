"""In what form a layer keeps its numbers: as they are, or in packed bits.

A method decides what is stored (keys, latents, bases, entries), a `Storage` how. Layers are given one and ask it for
their buffers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from kvgauge.store.buffers import GROWTH_STEP, GrowingBuffer
from kvgauge.store.half_rows import HalfRows, half_of
from kvgauge.store.quantized_rows import ChannelQuantizedRows, QuantizedRows, TokenQuantizedRows
from kvgauge.store.rotated_rows import RotatedRows
from kvgauge.store.rows import RowBuffer
from kvgauge.store.turbo_rows import TurboRows
from kvgauge.store.windowed_rows import WindowedRows

Kept = GrowingBuffer | HalfRows  # both give their oldest rows away one by one

AXES = ("token", "channel")
PARTS = ("keys", "values")


class Storage(ABC):
    """A factory of buffers, and what they will take."""

    @property
    @abstractmethod
    def reference_bits(self) -> int | None:
        """As `Method.reference_bits`."""

    @abstractmethod
    def rows(self, suited: str = "token", *, dimension_major: bool = False, part: str = "values") -> RowBuffer:
        """A buffer for the compressed tokens.

        Args:
            suited: the axis of `AXES` along which numbers of this kind are alike, where the user has no other wish.
            dimension_major: see `GrowingBuffer`.
            part: of `PARTS`, whose numbers they are: a storage may keep the two in different forms.
        """

    @abstractmethod
    def kept(self, step: int = GROWTH_STEP) -> Kept:
        """A buffer for tokens that the method keeps as they are: sinks, windows, tails."""

    @abstractmethod
    def factor(self) -> RowBuffer:
        """A buffer for a matrix that all tokens share, (…, features, rank)."""

    @abstractmethod
    def rows_nbytes(
        self, tokens: int, dimension: int, dtype: torch.dtype, suited: str = "token", *, part: str = "values"
    ) -> int:
        """Bytes of `tokens` rows of one head in a buffer of `rows`, right after `set`; `dtype` is the model's."""

    @abstractmethod
    def kept_nbytes(self, tokens: int, dimension: int, dtype: torch.dtype) -> int:
        """The same for `kept`."""

    @abstractmethod
    def factor_nbytes(self, features: int, dimension: int, dtype: torch.dtype) -> int:
        """The same for `factor`."""


@dataclass(frozen=True)
class ExactStorage(Storage):
    """Everything in the model's dtype."""

    @property
    def reference_bits(self) -> None:
        return None

    def rows(self, suited: str = "token", *, dimension_major: bool = False, part: str = "values") -> GrowingBuffer:
        return GrowingBuffer(dimension_major=dimension_major)

    def kept(self, step: int = GROWTH_STEP) -> GrowingBuffer:
        return GrowingBuffer(step)

    def factor(self) -> GrowingBuffer:
        return GrowingBuffer()

    def rows_nbytes(
        self, tokens: int, dimension: int, dtype: torch.dtype, suited: str = "token", *, part: str = "values"
    ) -> int:
        return tokens * dimension * dtype.itemsize

    def kept_nbytes(self, tokens: int, dimension: int, dtype: torch.dtype) -> int:
        return tokens * dimension * dtype.itemsize

    def factor_nbytes(self, features: int, dimension: int, dtype: torch.dtype) -> int:
        return features * dimension * dtype.itemsize


EXACT = ExactStorage()

FACTOR_GROUP = 64
FACTOR_BITS = 8  # every token's error would be made of a factor's; at 8 bits it is a sixteenth of that of 4-bit tokens


@dataclass(frozen=True)
class QuantizedStorage(Storage):
    """Tokens in packed codes; what a method keeps as it is in 16 bits; factors in 8 bits.

    16 bits are float16, or the model's own 16-bit dtype: rounding by 2⁻¹¹ is far below what the codes lose.

    Attributes:
        bits: of a code.
        axis: one of `AXES`, or None for what suits the numbers.
        group: numbers that share a scale and a minimum: channels of a token, or tokens of a channel.
        balance: equalise the channels of a context first; only along the token axis, the other does it by itself.
        window: most recent tokens of the compressed ones that stay in 16 bits.
        rotate: one of `kvgauge.store.rotations.ROTATIONS`, which rows are turned by first; None turns nothing.
    """

    bits: int
    axis: str | None = None
    group: int = 64
    balance: bool = True
    window: int = 0
    rotate: str | None = None

    @property
    def reference_bits(self) -> int:
        return 16

    def rows(self, suited: str = "token", *, dimension_major: bool = False, part: str = "values") -> RowBuffer:
        made: QuantizedRows | WindowedRows
        if (self.axis or suited) == "channel":
            made = ChannelQuantizedRows(self.bits, self.group, dimension_major=dimension_major)
        else:
            made = TokenQuantizedRows(self.bits, self.group, balance=self.balance, dimension_major=dimension_major)
        if self.window:
            made = WindowedRows(made, self.window, self.group)
        return made if self.rotate is None else RotatedRows(made, self.rotate)

    def kept(self, step: int = GROWTH_STEP) -> HalfRows:
        return HalfRows(step)

    def factor(self) -> TokenQuantizedRows:
        return TokenQuantizedRows(max(self.bits, FACTOR_BITS), self.group)

    def rows_nbytes(
        self, tokens: int, dimension: int, dtype: torch.dtype, suited: str = "token", *, part: str = "values"
    ) -> int:
        recent = min(tokens, self.window)
        return self._coded_nbytes(tokens - recent, dimension, suited) + self.kept_nbytes(recent, dimension, dtype)

    def _coded_nbytes(self, tokens: int, dimension: int, suited: str) -> int:
        if (self.axis or suited) == "channel":
            return ChannelQuantizedRows.nbytes_of(tokens, dimension, self.bits, self.group)
        return TokenQuantizedRows.nbytes_of(tokens, dimension, self.bits, self.group, self.balance)

    def kept_nbytes(self, tokens: int, dimension: int, dtype: torch.dtype) -> int:
        return tokens * dimension * half_of(dtype).itemsize

    def factor_nbytes(self, features: int, dimension: int, dtype: torch.dtype) -> int:
        return TokenQuantizedRows.nbytes_of(features, dimension, max(self.bits, FACTOR_BITS), self.group, False)


@dataclass(frozen=True)
class TurboStorage(Storage):
    """Tokens as norms and codes of rotated directions, see `kvgauge.store.turbo_rows`; the rest as `QuantizedStorage`.

    Attributes:
        key_bits, value_bits: of a number, 2 to 4 in halves.
        signs: one of the bits is a sign of the residual (``prod``).
        rotate: one of `kvgauge.store.rotations.ROTATIONS`.
        seed: of the rotation.
    """

    key_bits: float
    value_bits: float
    signs: bool = False
    rotate: str = "orthogonal"
    seed: int = 0

    @property
    def reference_bits(self) -> int:
        return 16

    def _bits(self, part: str) -> float:
        return self.key_bits if part == "keys" else self.value_bits

    def rows(self, suited: str = "token", *, dimension_major: bool = False, part: str = "values") -> TurboRows:
        return TurboRows(
            self._bits(part), signs=self.signs, kind=self.rotate, seed=self.seed, dimension_major=dimension_major
        )

    def kept(self, step: int = GROWTH_STEP) -> HalfRows:
        return HalfRows(step)

    def factor(self) -> TokenQuantizedRows:
        return TokenQuantizedRows(FACTOR_BITS, FACTOR_GROUP)

    def rows_nbytes(
        self, tokens: int, dimension: int, dtype: torch.dtype, suited: str = "token", *, part: str = "values"
    ) -> int:
        return TurboRows.nbytes_of(tokens, dimension, self._bits(part), self.signs)

    def kept_nbytes(self, tokens: int, dimension: int, dtype: torch.dtype) -> int:
        return tokens * dimension * half_of(dtype).itemsize

    def factor_nbytes(self, features: int, dimension: int, dtype: torch.dtype) -> int:
        return TokenQuantizedRows.nbytes_of(features, dimension, FACTOR_BITS, FACTOR_GROUP, False)
