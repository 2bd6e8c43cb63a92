"""The tables beside the frontier: which cells dominate which, and the best of each budget."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from kvgauge.evaluation.dominance import Comparison, best_by_budget, settings

Row = dict[str, Any]

PAIRS = ["model", "compress_at", "cell", "other", "bytes_ratio", "other_bytes_ratio", "diff", "diff_low", "diff_high"]
POINTS = ["model", "compress_at", "cell", "bytes_ratio", "mean", "dominated_by", "dominates"]
BEST = [
    *("model", "compress_at", "budget", "published", "published_score", "published_bytes_ratio"),
    *("combination", "combination_score", "combination_bytes_ratio", "diff", "diff_low", "diff_high"),
]


@dataclass(frozen=True)
class FrontierTables:
    """Numbers, unrounded.

    Attributes:
        pairs: one row per cell and other cell that it dominates.
        points: one row per cell: its bytes and mean, which cells dominate it, and how many it dominates.
        best: one row per budget.
    """

    pairs: pd.DataFrame
    points: pd.DataFrame
    best: pd.DataFrame


def frontier_tables(samples: Iterable[Mapping[str, Any]], baseline: str = "full") -> FrontierTables:
    """The tables of all comparisons in rows of samples."""
    pairs: list[Row] = []
    points: list[Row] = []
    best: list[Row] = []
    for model, compress_at, rows in settings(samples, baseline):
        comparison, setting = Comparison(rows), {"model": model, "compress_at": compress_at}
        if not comparison.samples:
            continue
        found = comparison.dominance()
        pairs += [setting | row for row in found]
        above: dict[str, list[str]] = defaultdict(list)
        below: dict[str, int] = defaultdict(int)
        for row in found:
            above[row["other"]].append(row["cell"])
            below[row["cell"]] += 1
        means = comparison.means()
        for cell in sorted(comparison.cells, key=lambda cell: (-comparison.ratios[cell], -means[cell], cell)):
            named = ", ".join(sorted(above[cell], key=lambda other: (-means[other], other)))
            figures = {"bytes_ratio": comparison.ratios[cell], "mean": means[cell]}
            points.append(setting | {"cell": cell} | figures | {"dominated_by": named, "dominates": below[cell]})
        best += [setting | row for row in best_by_budget(rows, comparison)]
    return FrontierTables(
        pd.DataFrame.from_records(pairs, columns=PAIRS),
        pd.DataFrame.from_records(points, columns=POINTS),
        pd.DataFrame.from_records(best, columns=BEST) if best else pd.DataFrame(columns=BEST),
    )
