"""AsymKV: merging of adjacent tokens by squared gradients of the loss (arXiv 2506.05410)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvgauge.methods.merging.gradient_merged import GradientMergedLayer, GradientMergingCache
from kvgauge.methods.merging.merged import MergedLayer
from kvgauge.methods.merging.merging import Merging
from kvgauge.methods.merging.merging_cache import MergingCache


@dataclass(frozen=True, kw_only=True)
class AsymKV(Merging):
    """Keys are weighed, coordinate by coordinate, by the diagonal of the Fisher information; values are summed.

    Every window costs a backward pass of the next-token loss, which is taken for real: through `kvgauge.generate` and
    the prefill of the evaluation. The pairs are chosen as in KVSlimmer.
    """

    name: str = "asymkv"

    rule: ClassVar[str] = "fisher"
    layer_type: ClassVar[type[MergedLayer]] = GradientMergedLayer
    cache_type: ClassVar[type[MergingCache]] = GradientMergingCache
