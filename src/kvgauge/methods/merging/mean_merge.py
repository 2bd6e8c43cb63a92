"""Plain merging of adjacent tokens: the baseline of KVSlimmer and AsymKV that shares their choice of pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvgauge.methods.merging.merging import Merging


@dataclass(frozen=True, kw_only=True)
class MeanMerge(Merging):
    """Keys are averaged, values are summed; the pairs are chosen as in KVSlimmer."""

    name: str = "mean_merge"

    rule: ClassVar[str] = "mean"
