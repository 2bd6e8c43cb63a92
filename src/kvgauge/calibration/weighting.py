"""What a subspace is asked to keep: weights on features, put on before an SVD and taken off its factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Weighting:
    """Symmetric roots ``M^{1/2}`` of a metric per layer and head, and their inverses.

    The truncated SVD of ``X M^{1/2} ≈ Z Ŵᵀ`` minimises ``tr(E M Eᵀ)`` of the error ``E = X − Z (M^{-1/2} Ŵ)ᵀ``: what is
    stored is the basis Z and the factor ``M^{-1/2} Ŵ``, and nothing that reads them knows of the weights.

    Attributes:
        roots, inverses: (layers, num_key_value_heads, head_dim, head_dim), float32.
    """

    roots: Tensor
    inverses: Tensor

    def weighted(self, rows: Tensor, layer: int) -> Tensor:
        """``X M^{1/2}`` of the features (…, tokens, num_key_value_heads · head_dim) of one layer."""
        root = self.roots[layer].to(rows)
        return torch.einsum("...nd,nde->...ne", rows.unflatten(-1, root.shape[:2]), root).flatten(-2)

    def unweighted(self, factor: Tensor, layer: int) -> Tensor:
        """``M^{-1/2} Ŵ`` of the factor (num_key_value_heads · head_dim, rank) of one layer."""
        inverse = self.inverses[layer].to(factor)
        return (inverse @ factor.unflatten(0, inverse.shape[:2])).flatten(0, 1)

    def part(self, layers: range) -> Weighting:
        """The weights of some consecutive layers."""
        return Weighting(self.roots[layers.start : layers.stop], self.inverses[layers.start : layers.stop])

    def to(self, device: torch.device) -> Weighting:
        """The same on a device."""
        return Weighting(self.roots.to(device), self.inverses.to(device))

    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.roots, self.inverses))
