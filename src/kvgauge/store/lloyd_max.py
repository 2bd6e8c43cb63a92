"""The best scalar code books of a normal density (Lloyd, 1957; Max, 1960)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

STEPS = 4000  # of Lloyd's iteration, which converges linearly; 16 levels have settled to 1e-9 by then


@cache
def lloyd_max(bits: int) -> Tensor:
    """The 2 ** bits levels that minimise the mean square error of a standard normal number, ascending, float32.

    Every level is the mean of its cell, ``(φ(a) − φ(b)) / (Φ(b) − Φ(a))``, and cells end halfway between levels.
    """
    count = 2**bits
    # levels as dense as the cube root of the density, which is best for many of them
    levels = 3**0.5 * torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    edges = torch.tensor([-torch.inf, torch.inf], dtype=torch.float64)
    for _ in range(STEPS):
        cells = torch.cat([edges[:1], (levels[1:] + levels[:-1]) / 2, edges[1:]])
        density, mass = torch.exp(-cells.square() / 2) / (2 * torch.pi) ** 0.5, torch.special.ndtr(cells)
        levels = (density[:-1] - density[1:]) / (mass[1:] - mass[:-1])
    return levels.float()
