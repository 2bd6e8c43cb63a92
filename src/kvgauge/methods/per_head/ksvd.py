"""K-SVD: the truncated SVD of the keys alone, the baseline that KQ-SVD (arXiv 2512.05916) is proved against."""

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
class KSVD(LowRankPerHead):
    """``A = B`` = top right singular vectors of K; the same of V for the values."""

    name: str = "ksvd"

    def key_pair(self, moments: Moments) -> Pair:
        return principal_pair(moments.keys(self.rope))

    def value_pair(self, moments: Moments, model: PreTrainedModel) -> Pair:
        return principal_pair(moments.values())

    def latent_pair(self, moments: Moments, model: PreTrainedModel) -> Pair:
        return principal_pair(moments.keys(self.rope))

    def energies(self, spectrum: Tensor) -> Tensor:
        return spectrum.square()
