"""Weighted k-means in one dimension, for many rows at once.

Sorted values turn a cluster into an interval, and prefix sums turn its mean and its error into look-ups. The start is
the exact optimum (dynamic programming) of a row that was thinned to a hundred atoms, so that heavy tails do not trap
what follows: Lloyd's iteration on all values, k binary searches a row and step. Libraries fit one row at a time, and a
model has 100,000.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

ATOMS = 128  # of a thinned row, unless the caller asks for a faster start
ITERATIONS = 100
TOLERANCE = 1e-6  # of the range of a row: centroids that move less have settled


def weighted_kmeans(values: Tensor, weights: Tensor, count: int, atoms: int = ATOMS) -> Tensor:
    """Centroids that minimise ``Σ w_i min_c (v_i − c)²`` of every row.

    A row whose weights are all zero is taken as equally weighted.

    Args:
        values: (rows, n).
        weights: (rows, n), 0 or more.
        count: k, centroids of a row.
        atoms: of a thinned row, for the start; its time grows with their square.

    Returns:
        (rows, k), ascending, float32; equal ones where a row has fewer than k different values.
    """
    ordered, order = values.double().sort(dim=-1)
    mass = weights.double().gather(-1, order)
    mass = torch.where(mass.sum(dim=-1, keepdim=True) > 0, mass, 1.0)
    sums = _PrefixSums(ordered, mass)
    return sums.settle(_optimum(sums, _atoms(ordered, mass, atoms), count)).float()


def _atoms(ordered: Tensor, mass: Tensor, most: int) -> Tensor:
    """Bounds (rows, atoms + 1) of up to `most` runs of sorted values, as finely spaced as their density asks.

    The best levels lie with a density that is the cube root of the samples' (Panter and Dite 1951); so do these.
    """
    rows, length = ordered.shape
    if length <= most:
        return torch.arange(length + 1, device=ordered.device).expand(rows, -1)
    # Between two samples the density is their weight over their distance: its cube root, integrated, is this.
    grown = (mass[:, 1:] + mass[:, :-1]).pow(1 / 3) * ordered.diff(dim=-1).pow(2 / 3)
    total = grown.cumsum(-1)
    shares = torch.arange(1, most, dtype=torch.float64, device=ordered.device) / most
    inner = torch.searchsorted(total, shares * total[:, -1:]) + 1
    return pad(pad(inner, (1, 0)), (0, 1), value=length)


def _optimum(sums: _PrefixSums, bounds: Tensor, count: int) -> Tensor:
    """Centroids (rows, count) of the best partition of atoms into at most `count` intervals."""
    mass, moment, square = (part.gather(-1, bounds) for part in (sums.mass, sums.moment, sums.square))
    spans = [part[:, None, :] - part[:, :, None] for part in (mass, moment, square)]  # (rows, from, to)
    error = (spans[2] - torch.where(spans[0] > 0, spans[1].square() / spans[0], 0.0)).clamp(min=0)
    atoms = bounds.shape[1] - 1
    backwards = torch.ones(atoms + 1, atoms + 1, dtype=torch.bool, device=error.device).tril(-1)
    error.masked_fill_(backwards, torch.inf)
    best, cuts = error[:, 0], []
    for _ in range(count - 1):
        best, cut = (best[:, :, None] + error).min(dim=1)
        cuts.append(cut)
    ends = [torch.full_like(bounds[:, :1], atoms)]
    for cut in reversed(cuts):
        ends.append(cut.gather(-1, ends[-1]))
    edges = pad(torch.cat(ends[::-1], dim=-1), (1, 0))
    mass, moment = (part.gather(-1, edges).diff(dim=-1) for part in (mass, moment))
    first = sums.ordered.gather(-1, bounds.gather(-1, edges[:, :-1]).clamp(max=sums.ordered.shape[-1] - 1))
    return torch.where(mass > 0, moment / mass, first).sort(dim=-1).values


class _PrefixSums:
    """Sorted rows with the running sums of their weights, their weighted values and their weighted squares."""

    def __init__(self, ordered: Tensor, mass: Tensor) -> None:
        self.ordered = ordered.contiguous()
        self.mass, self.moment, self.square = (
            pad((mass * ordered.pow(power)).cumsum(-1), (1, 0)) for power in range(3)
        )

    def settle(self, centroids: Tensor) -> Tensor:
        """Lloyd's iteration from `centroids` (rows, k) until they stay; an empty cluster keeps its centroid."""
        enough = TOLERANCE * (self.ordered[:, -1:] - self.ordered[:, :1])
        for _ in range(ITERATIONS):
            mass, moment = self._clusters(centroids)
            moved = torch.where(mass > 0, moment / mass, centroids)
            settled = bool(((moved - centroids).abs() <= enough).all())
            centroids = moved
            if settled:
                break
        return centroids.sort(dim=-1).values

    def _clusters(self, centroids: Tensor) -> tuple[Tensor, Tensor]:
        """(weight, weighted sum) of the values nearest to each centroid, (rows, k)."""
        between = (centroids[:, 1:] + centroids[:, :-1]) / 2
        inner = torch.searchsorted(self.ordered, between.contiguous())
        bounds = pad(pad(inner, (1, 0)), (0, 1), value=self.ordered.shape[-1])
        mass, moment = (sums.gather(-1, bounds).diff(dim=-1) for sums in (self.mass, self.moment))
        return mass, moment
