"""KVSlimmer: gradient-free asymmetric merging of adjacent tokens (arXiv 2603.00907)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvgauge.methods.merging.merging import Merging


@dataclass(frozen=True, kw_only=True)
class KVSlimmer(Merging):
    """Keys are merged to the minimiser of the second-order expansion of the output, off-diagonal terms included.

    Values are summed. Everything the merge needs comes from the one forward pass; the formulas are in
    `kvgauge.methods.merging.merge_keys`. Differences from the published code, all of them undone by ``published: true``
    (`kvgauge.methods.merging.traits`):

    1. Of a run of chosen pairs it merges the first two entries and drops the others: 58 to 86% of what it removes is
       dropped, so that most of its merging is eviction.
    2. Its entries gain one entry a round, so that its clip at 5 is rarely reached. A chain of up to 24 tokens that is
       clipped keeps the sum of its values and counts as 5, and weighs too much: chains are not clipped unless `clip`
       says so, and ``pairs: bounded`` keeps them within it.
    3. Its cost of a pair is the attention times one number, not times the pair's cardinality.
    4. It reads the next window first, merges the past by its queries, and reads the window again; the window that is
       being read never merges.
    5. Its cache holds start + recent entries and the last window beside them.
    6. An entry stands at its last token.
    7. α is over the entries behind the start alone, h is averaged over all windows, and δ is of summed values. Here α
       is over all entries, so that ``o`` is the output, and a window's entries may merge as soon as it is read, their
       attention counted per query that could see them.
    """

    name: str = "kvslimmer"

    rule: ClassVar[str] = "hessian"
