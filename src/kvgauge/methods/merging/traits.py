"""In what the papers, their published codes and this suite differ, trait by trait.

The published codes of KVSlimmer (arXiv 2603.00907) and AsymKV (arXiv 2506.05410) were run unchanged and compared. What
they share with this suite: the start, γ and the index of a pair, summed column sums of the attention, ``c e^s``
normalisation, summed values, the clip at 5, ``a² h_11 + b² h_22`` of a merged entry (KVSlimmer), and the formula of the
merged key, which agrees to a median of 1e-7 to 4e-5 of ``‖k_1 − k_2‖`` given the same α and h. What they do not share
are the traits below; `PUBLISHED` is what the codes do. The papers' texts are silent on all but the cost.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvgauge.methods.merging.merge_costs import COSTS
from kvgauge.methods.merging.merge_pairs import PAIRS

DECIDED_BY = ("own", "next")
POSITIONS = ("first", "last")
CURVATURES = ("output", "published")
PUBLISHED_CLIP = 5


@dataclass(frozen=True)
class Traits:
    """How a layer makes room.

    Attributes:
        pairs: one of `kvgauge.methods.merging.merge_pairs.PAIRS`: what becomes of chosen pairs that overlap.
        cost: one of `kvgauge.methods.merging.merge_costs.COSTS`: which pairs are the cheapest.
        decided_by: ``own``: when a window has been read, everything behind the start may merge, the window included, by
            the attention of the window's own queries, counted per query that could see an entry; the limit holds for
            all of it. ``next``: before a window is read, what was read before is merged by the attention of ITS
            queries; the newest window is not merged and stands outside the limit. The queries are those of the forward
            pass that begins the window, at most a window of them. The codes run the whole model over the next window
            for them, so that the queries of every layer come from layers whose past is not merged yet; here a layer
            asks before it reads, so they come from layers that have merged.
        position: ``first``: an entry stands at the position of its first token, ``last``: of its last.
        curvature: ``output``: α is a share of all entries, so that ``o`` is the output, and values are means; n counts
            the windows that merged. ``published``: α is a share of the entries behind the start, ``δ`` is taken from
            summed values, and n counts all windows. Of AsymKV: ``output`` averages squared gradients (the Fisher
            diagonal) and keeps ``a² h_11 + b² h_22``; ``published`` averages gradients, squares the average, and keeps
            ``g_1 + g_2``, and until something was merged every window begins anew.
    """

    pairs: str
    cost: str
    decided_by: str
    position: str
    curvature: str


DEFAULT = Traits(pairs="chain", cost="cardinality", decided_by="own", position="first", curvature="output")
PUBLISHED = Traits(pairs="drop", cost="attention", decided_by="next", position="last", curvature="published")

CHOICES = {
    "pairs": PAIRS,
    "cost": COSTS,
    "decided_by": DECIDED_BY,
    "position": POSITIONS,
    "curvature": CURVATURES,
}
