"""KVSlimmer: gradient-free asymmetric merging of adjacent tokens (arXiv 2603.00907)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvgauge.methods.merging.merging import Merging


@dataclass(frozen=True, kw_only=True)
class KVSlimmer(Merging):
    """Keys are merged to the minimiser of the second-order expansion of the output, off-diagonal terms included.

    Values are summed. Everything the merge needs comes from the one forward pass; the formulas are in
    `kvgauge.methods.merging.merge_keys`. Two differences from the published code: an entry's share of the attention is
    over all entries, the start included, so that ``o`` is the output; and the newest window's entries may merge too,
    their attention counted per query that could see them.
    """

    name: str = "kvslimmer"

    rule: ClassVar[str] = "hessian"
