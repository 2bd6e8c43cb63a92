"""Eigen Attention (arXiv 2408.05646): one subspace for keys and queries together, the joint baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import PreTrainedModel

from kvgauge.methods.per_head.factorization import Pair, principal_pair
from kvgauge.methods.per_head.low_rank import LowRankPerHead

if TYPE_CHECKING:
    from kvgauge.calibration.moments import Moments


@dataclass(frozen=True, kw_only=True)
class Eigen(LowRankPerHead):
    """``A = B`` = top right singular vectors of ``[K; Q]``; those of V for the values."""

    name: str = "eigen"

    def key_pair(self, moments: Moments) -> Pair:
        return principal_pair(moments.keys(self.rope) + moments.queries(self.rope))

    def value_pair(self, moments: Moments, model: PreTrainedModel) -> Pair:
        return principal_pair(moments.values())

    def energies(self, spectrum: Tensor) -> Tensor:
        return spectrum.square()
