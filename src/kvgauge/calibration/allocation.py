"""One budget over layers and over keys and values: ranks go where the next one takes away most loss per byte.

For convex losses that add up, taking the steps of best reduction per byte one after the other is optimal (water-filling
by steps). Losses of pairs that are not optimal for what is measured need not be convex: their lower convex hull is
taken, whose corners are reached where its segments end.

Losses of keys and values are made comparable by what they do to an attention output ``o = Σ_j p_j v_j``. To first order
errors e_j of the values move it by ``Σ p_j e_j``, and errors δ_j of the scores by ``Σ p_j δ_j (v_j − o)``. Where errors
of different tokens are independent, the first is ``Σ p_j² ‖e_j‖²`` and the second ``Σ p_j² δ_j² ‖v_j − o‖²``: the mean
SQUARE of the score's error, not relative to the scores, compares with the error of the values RELATIVE to the values.
(Relative to the scores it would not: between a third and nine tenths of their energy, in SmolLM2's layers, is an offset
common to all keys, which no softmax sees.) This takes ``‖v_j − o‖²`` for the mean ``‖v_j‖²``; for the tokens that have
the attention it is less (0.1 to 0.6 of it in SmolLM2): `energy` gives the keys too much, `greedy`, which measures, does
not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvgauge.calibration.moments import Moments
from kvgauge.errors import UserError, unknown

LOSSES = ("loss_k", "loss_v")  # names of a fit's tensors, a row per layer or group, a column per rank from 0 on
ALLOCATIONS = ("uniform", "energy", "greedy")

# Ranks that `greedy` measures, as shares of the largest one; between them the loss is taken to fall by equal factors.
LADDER = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)


def check_allocation(name: str, allocate: str, explicit: str | None) -> None:
    """Refuse an unknown way to allocate, and ranks that leave nothing to allocate.

    Args:
        name: of the method, for the error message.
        allocate: one of `ALLOCATIONS`.
        explicit: what decides the ranks instead of a budget; None where a budget does.

    Raises:
        UserError: either.
    """
    if allocate not in ALLOCATIONS:
        raise unknown(f"allocate of {name}", str(allocate), ALLOCATIONS)
    if allocate != "uniform" and explicit is not None:
        raise UserError(
            f"{name} has {explicit} beside allocate: {allocate}: give a budget to allocate, or leave it out"
        )


def ladder(limit: int) -> list[int]:
    """The ranks at which losses are measured, ascending, `limit` the last."""
    return sorted({1, limit, *(max(1, int(share * limit)) for share in LADDER)})


def interpolated(ranks: Sequence[int], losses: Sequence[float]) -> Tensor:
    """Losses at ranks 0 … the largest of `ranks`, float64.

    Between two ranks the loss falls by equal factors, as spectra do, or in equal steps where it ends at 0; below the
    first it is constant.
    """
    everywhere, known = np.arange(ranks[-1] + 1), np.asarray(losses, dtype=np.float64)
    curve = np.interp(everywhere, ranks, known)
    positive = int((np.cumprod(known > 0) > 0).sum())
    if positive:
        factors = everywhere[: ranks[positive - 1] + 1]
        curve[: len(factors)] = np.exp(np.interp(factors, ranks[:positive], np.log(known[:positive])))
    return torch.from_numpy(curve)


def lower_hull(curve: Tensor) -> Tensor:
    """The lower convex hull of a loss at ranks 0 … n, where it falls, at every rank; float64."""
    points = curve.double().cummin(dim=0).values.tolist()
    corners: list[int] = []
    for rank, loss in enumerate(points):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (points[b] - points[a]) * (rank - b) < (loss - points[b]) * (b - a):
                break  # the slope rises at b: it is a corner
            corners.pop()
        corners.append(rank)
    return torch.from_numpy(np.interp(np.arange(len(points)), corners, [points[corner] for corner in corners]))


def spend(curves: Sequence[Tensor], costs: Sequence[float], numbers: float) -> list[int]:
    """The ranks that `numbers` numbers pay for with the least sum of losses, as many as possible, each at least 1.

    Args:
        curves: for each part (keys of a layer, values of a group, …) its loss at ranks 0 … its largest.
        costs: numbers that one rank of the part stores.
        numbers: what the budget pays for.
    """
    steps = []
    for part, (curve, cost) in enumerate(zip(curves, costs, strict=True)):
        gains = -lower_hull(curve[1:]).diff() / cost
        steps += [(-gain, step, part) for step, gain in enumerate(gains.tolist())]
    ranks, rest = [1] * len(curves), numbers - sum(costs)
    for _, _, part in sorted(steps):
        if costs[part] <= rest:
            ranks[part] += 1
            rest -= costs[part]
    return ranks


def held_out(name: str, moments: Moments) -> Tensor:
    """The held-out sequences.

    Raises:
        UserError: there are none.
    """
    if moments.held_out is None:
        raise UserError(
            f"{name} allocates by losses on held-out sequences, and these moments have none: "
            f"lower corpus.num_sequences, or collect with held_out"
        )
    return moments.held_out
