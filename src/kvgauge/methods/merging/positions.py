"""Running positions: tokens stand at the sums of the cardinalities before them, not where the model counts them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvgauge.architecture.rotary import Rotary, turn


@dataclass(frozen=True)
class NewTokens:
    """The tokens of a forward pass, the same for all layers.

    Attributes:
        valid: (batch, tokens), False on padding; None where there is none.
        lags: (batch or 1, tokens), running positions minus the model's before anything was taken away; None for 0.
    """

    valid: Tensor | None = None
    lags: Tensor | None = None

    def to(self, device: torch.device) -> NewTokens:
        """The same on a device."""
        return NewTokens(*(None if numbers is None else numbers.to(device) for numbers in (self.valid, self.lags)))

    def part(self, start: int, stop: int) -> NewTokens:
        """The tokens from `start` to `stop`."""
        return NewTokens(*(None if numbers is None else numbers[:, start:stop] for numbers in (self.valid, self.lags)))


class RunningPositions:
    """How far the rows of a layer have fallen behind the model's positions.

    Args:
        rotary: of the model.

    Attributes:
        lags: positions that clipping and eviction have taken away, one number a row.
    """

    def __init__(self, rotary: Rotary) -> None:
        self.rotary = rotary
        self.lags: list[int] = []
        self._placed: Tensor | None = None  # the lags, (batch, 1), where they are used
        self._turning: tuple[Tensor, Tensor] | None = None  # by which the lags turn new tokens

    def begin(self, lags: Sequence[int]) -> None:
        """Rows that lag by so much."""
        self.lags, self._placed, self._turning = list(lags), None, None

    def add(self, lost: Tensor) -> None:
        """More positions are gone, (batch,)."""
        self.begin([lag + more for lag, more in zip(self.lags, lost.tolist(), strict=True)])

    def place(self, query: Tensor, keys: Tensor, new_lags: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queries and keys (batch, heads, tokens, head_dim) of new tokens at their running positions.

        Args:
            query, keys: at the model's positions.
            new_lags: see `NewTokens`.
        """
        turning = self._turning_of(new_lags, query)
        if turning is None:
            return query, keys
        both = turn(torch.cat([query, keys], dim=1), turning)  # one after the other took longer at decoding
        query, keys = both.split([query.shape[1], keys.shape[1]], dim=1)
        return query, keys

    def prepare(self, device: torch.device) -> None:
        """Have the angles ready for tokens on `device` that stand at the model's positions but for the lags."""
        self._turning_of(None, torch.empty(0, device=device))

    def _turning_of(self, new_lags: Tensor | None, query: Tensor) -> tuple[Tensor, Tensor] | None:
        """From the model's positions to the running ones; None where they are the same."""
        if not any(self.lags):
            return None if new_lags is None else self.rotary.turning(new_lags, query)
        if self._placed is None or self._placed.device != query.device:
            self._placed = torch.tensor(self.lags, device=query.device)[:, None]
        if new_lags is not None:
            return self.rotary.turning(new_lags - self._placed, query)
        if self._turning is None:  # the same until the next merge
            self._turning = self.rotary.turning(-self._placed, query)
        return self._turning

    def forget(self) -> None:
        """Free the angles; they are made again when they are needed."""
        self._turning = None

    def nbytes(self) -> int:
        """Of the angles."""
        return sum(part.untyped_storage().nbytes() for part in self._turning or ())

    def map_batch(self, select: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Apply a selection along the batch."""
        self.begin(select(torch.tensor(self.lags, device=device)).tolist() if self.lags else self.lags)
