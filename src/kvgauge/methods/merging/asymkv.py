"""AsymKV: merging of adjacent tokens by squared gradients of the loss (arXiv 2506.05410)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from kvgauge.methods.merging.gradient_merged import GradientMergedLayer, GradientMergingCache
from kvgauge.methods.merging.merged import MergedLayer
from kvgauge.methods.merging.merging import Merging
from kvgauge.methods.merging.merging_cache import MergingCache
from kvgauge.methods.merging.traits import PUBLISHED, Traits


@dataclass(frozen=True, kw_only=True)
class AsymKV(Merging):
    """Keys are weighed, coordinate by coordinate, by the diagonal of the Fisher information; values are summed.

    Every window costs a backward pass of the next-token loss, which is taken for real: through `kvgauge.generate` and
    the prefill of the evaluation. The pairs are chosen as in KVSlimmer.

    Differences from the published code, all of them undone by ``published: true`` (`kvgauge.methods.merging.traits`):
    it drops the overlaps of chosen pairs; the next window's loss and queries decide, for which every window is read
    twice, and the newest window stands outside the limit and is never merged; an entry stands at its last token; and
    the gradients themselves are averaged over the windows and then squared, where here squares are averaged, merged
    entries keep their sum, and until something was merged every window begins anew. Its cost has the cardinality, as
    here.
    """

    name: str = "asymkv"

    rule: ClassVar[str] = "fisher"
    published_traits: ClassVar[Traits] = replace(PUBLISHED, cost="cardinality")
    layer_type: ClassVar[type[MergedLayer]] = GradientMergedLayer
    cache_type: ClassVar[type[MergingCache]] = GradientMergingCache

    @property
    def curved_rule(self) -> str:
        return "gradient" if self.traits.curvature == "published" else self.rule
