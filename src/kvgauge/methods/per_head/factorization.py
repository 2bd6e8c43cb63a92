"""Closed forms of the low-rank pairs, from second moments; everything in float64, batched over layers and heads.

With ``C_K = KᵀK`` and ``C_Q = QᵀQ`` the singular values of ``C_K^{1/2} C_Q^{1/2}`` are those of ``K Qᵀ``: K and Q
themselves, whose rows are tokens, are never needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Moments square the condition number: below this share of the largest eigenvalue float64 holds only rounding.
EIGENVALUE_FLOOR = 1e-13


@dataclass(frozen=True)
class Pair:
    """A pair (A, B), best direction first, so that a rank r is the first r columns.

    Attributes:
        A, B: (…, d, d) float64; ``X ≈ (X A) Bᵀ`` in the sense that the method optimises.
        spectrum: (…, d) singular values of what was factored, in descending order.
        floored: eigenvalues below the floor, over all layers and heads.
    """

    A: Tensor
    B: Tensor
    spectrum: Tensor
    floored: int


def _eigen(moment: Tensor) -> tuple[Tensor, Tensor, int]:
    """Eigenvalues (descending, floored) and eigenvectors of a symmetric moment, and how many were floored."""
    values, vectors = torch.linalg.eigh((moment + moment.transpose(-1, -2)) / 2)
    values, vectors = values.flip(-1), vectors.flip(-1)
    floor = values[..., :1].clamp_min(torch.finfo(values.dtype).tiny) * EIGENVALUE_FLOOR
    return values.clamp_min(floor), vectors, int((values < floor).sum())


def principal_pair(moment: Tensor) -> Pair:
    """``A = B`` = principal directions of X, from ``XᵀX`` (…, d, d): the truncated SVD of X itself."""
    values, vectors, floored = _eigen(moment)
    return Pair(vectors, vectors, values.sqrt(), floored)


def product_pair(left: Tensor, right: Tensor, *, balanced: bool) -> Pair:
    """The pair that is optimal for the product ``X Yᵀ``, from ``left = XᵀX`` and ``right = YᵀY`` (…, d, d).

    With ``X Yᵀ = U S Zᵀ``: ``A = X⁺ U`` and ``B = Xᵀ U``, hence ``X A_r B_rᵀ Yᵀ = U_r U_rᵀ X Yᵀ``, the Eckart–Young
    optimum with squared error ``Σ_{i>r} S_i²`` (KQ-SVD, arXiv 2512.05916).

    Args:
        left, right: second moments, float64.
        balanced: scale the columns so that ``X A`` and ``Y B`` have the same norms ``S^{1/2}``; the product does not
            change, low precision and quantisation like it better than norms 1 and S.
    """
    values, vectors, floored = _eigen(left)
    root, inverse = values.sqrt().unsqueeze(-2), values.rsqrt().unsqueeze(-2)
    right_values, right_vectors, right_floored = _eigen(right)
    right_root = (right_vectors * right_values.sqrt().unsqueeze(-2)) @ right_vectors.transpose(-1, -2)
    rotated, spectrum, _ = torch.linalg.svd((vectors * root) @ vectors.transpose(-1, -2) @ right_root)
    basis = vectors.transpose(-1, -2) @ rotated
    A = (vectors * inverse) @ basis
    B = (vectors * root) @ basis
    if balanced:
        scale = (
            spectrum.clamp_min(spectrum[..., :1] * EIGENVALUE_FLOOR + torch.finfo(A.dtype).tiny).sqrt().unsqueeze(-2)
        )
        A, B = A * scale, B / scale
    return Pair(A, B, spectrum, floored + right_floored)
