"""Fixed random rotations of rows: every coordinate of what they turn is alike.

A rotation is drawn from a seed, made once per size, and serves all layers and sequences: ``d²`` numbers that belong to
no cache.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

ROTATIONS = ("orthogonal", "hadamard")


@cache
def rotation(kind: str, dimension: int, seed: int) -> Tensor:
    """An orthogonal matrix (dimension, dimension), float32: rows turn as ``rows @ rotation``.

    Args:
        kind: ``orthogonal``, uniformly random; ``hadamard``, random signs and then a Hadamard matrix, in blocks of
            powers of two where the dimension is none.
        dimension: of the rows.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "hadamard":
        signs = torch.randint(0, 2, (dimension,), generator=generator) * 2.0 - 1.0
        blocks = [1 << bit for bit in reversed(range(dimension.bit_length())) if dimension >> bit & 1]
        return (signs[:, None] * torch.block_diag(*map(_hadamard, blocks))).contiguous()
    matrix, upper = torch.linalg.qr(torch.randn(dimension, dimension, generator=generator, dtype=torch.float64))
    return (matrix * upper.diagonal().sign()).float().contiguous()


@cache
def gaussian(dimension: int, seed: int) -> Tensor:
    """Independent standard normal numbers, (dimension, dimension), float32."""
    return torch.randn(dimension, dimension, generator=torch.Generator().manual_seed(seed + 1))


def _hadamard(size: int) -> Tensor:
    """Sylvester's, orthonormal."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix / size**0.5
