"""KVQuant's grids: what a number is measured by before it becomes a code.

A grid brings rows to [−1, 1] and says which entries are outliers. Keys are measured per channel, by thresholds that
were calibrated offline; values per token, by thresholds found as the token comes (arXiv 2401.18079, sections 3.1 and
3.4). A grid is applied after its scales were rounded to what is stored, so that codes and levels agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-6  # of a channel or token without spread: divides nothing by zero
LARGEST_SCALE = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Measured:
    """Rows on their grid.

    Attributes:
        normalised: (…, tokens, width), in [−1, 1] but for outliers.
        outliers: True where an entry is kept as it is, the same shape; None where no entry is.
        scales: (…, tokens, 2) float16 scale and zero of every token; None where the grid keeps none per token.
    """

    normalised: Tensor
    outliers: Tensor | None
    scales: Tensor | None


class Grid(Protocol):
    """How rows (…, tokens, width) are measured."""

    sparse: bool
    """Entries may be outliers."""

    per_token: bool
    """Every token has a scale and a zero of its own."""

    def measure(self, rows: Tensor) -> Measured: ...

    def restore(self, normalised: Tensor, scales: Tensor | None) -> Tensor:
        """The inverse of `measure` without its outliers, in place."""
        ...

    def nbytes(self) -> int:
        """Bytes that serve every sequence alike."""
        ...


class ChannelGrid:
    """One scale and zero per channel, learnt offline; what lies outside the thresholds is an outlier.

    Args:
        low, high: thresholds (width,).
        sparse: keep outliers; otherwise they take the outermost level.
    """

    per_token = False

    def __init__(self, low: Tensor, high: Tensor, *, sparse: bool) -> None:
        self.sparse = sparse
        self.scale, self.zero = ((high - low) / 2).clamp(min=SMALLEST_SCALE), (high + low) / 2

    def measure(self, rows: Tensor) -> Measured:
        normalised = (rows - self.zero) / self.scale
        # A hair of tolerance: the thresholds themselves are calibration samples, and inside.
        return Measured(normalised, normalised.abs() > 1 + 1e-5 if self.sparse else None, None)

    def restore(self, normalised: Tensor, scales: Tensor | None) -> Tensor:
        return normalised.mul_(self.scale).add_(self.zero)

    def nbytes(self) -> int:
        return self.scale.nbytes + self.zero.nbytes


class TokenGrid:
    """One scale and zero per token, online; the `share` of entries farthest out, half on each side, are outliers.

    Args:
        share: of outliers; rounded to whole entries of a side.
        width: channels.
    """

    per_token = True

    def __init__(self, share: float, width: int) -> None:
        self.per_side = round(share * width / 2)
        self.sparse = self.per_side > 0

    def measure(self, rows: Tensor) -> Measured:
        outliers = None
        inner_low = inner_high = rows
        if self.sparse:
            top = rows.topk(self.per_side, dim=-1).indices
            bottom = rows.topk(self.per_side, dim=-1, largest=False).indices
            outliers = torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, torch.cat([top, bottom], dim=-1), True)
            inner_low, inner_high = (rows.masked_fill(outliers, bound) for bound in (torch.inf, -torch.inf))
        low, high = inner_low.amin(dim=-1, keepdim=True), inner_high.amax(dim=-1, keepdim=True)
        exact = torch.cat([((high - low) / 2).clamp(min=SMALLEST_SCALE), (high + low) / 2], dim=-1)
        scales = exact.clamp(-LARGEST_SCALE, LARGEST_SCALE).to(torch.float16)
        scale, zero = scales.to(rows.dtype).split(1, dim=-1)
        return Measured((rows - zero) / scale, outliers, scales)

    def restore(self, normalised: Tensor, scales: Tensor | None) -> Tensor:
        assert scales is not None
        scale, zero = scales.to(normalised.dtype).split(1, dim=-1)
        return normalised.mul_(scale).add_(zero)

    def nbytes(self) -> int:
        return 0
