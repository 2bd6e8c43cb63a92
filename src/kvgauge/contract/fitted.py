"""What a method learned: named tensors and metadata, on disk as safetensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from kvgauge.artifacts import read_tensors, write_tensors


@dataclass(frozen=True)
class Fitted:
    """Named tensors with the metadata that says what they belong to.

    Attributes:
        tensors: for per-head methods ``A``, ``B``, ``A_v``, ``B_v``, each (layers, num_key_value_heads, head_dim,
            head_dim), best direction first, so that any rank is a prefix; ``spectrum_k`` and ``spectrum_v``, each
            (layers, num_key_value_heads, head_dim), the singular values.
        metadata: fingerprints of model, moments and configuration; ``ranks`` per layer; how many eigenvalues were
            floored; seconds and bytes of the fit.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)

    def projections(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(A, B, A_v, B_v) of a layer at the ranks of the fit, each (num_key_value_heads, head_dim, rank)."""
        rank_k, rank_v = self.metadata["ranks"][layer]
        return self.truncated(layer, rank_k, rank_v)

    def truncated(self, layer: int, rank_k: int, rank_v: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(A, B, A_v, B_v) of a layer at the given ranks."""
        keys = (self.tensors[name][layer, :, :, :rank_k] for name in ("A", "B"))
        values = (self.tensors[name][layer, :, :, :rank_v] for name in ("A_v", "B_v"))
        first, second = keys
        third, fourth = values
        return first, second, third, fourth

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all."""
        write_tensors(path, self.tensors, self.metadata)

    @classmethod
    def load(cls, path: Path) -> Fitted:
        """Read what `save` wrote.

        Raises:
            UserError: the file is missing or damaged.
        """
        tensors, metadata = read_tensors(path)
        return cls(tensors, metadata)
