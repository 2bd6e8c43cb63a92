"""The frontier: every cell's score against its bytes, and a line through the cells that none beats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from kvgauge.report.plots.style import Palette, drawn_alike, log_ticks

Row = dict[str, Any]


EQUAL_BYTES = 1.04  # methods fill one budget to within a few percent of each other


def non_dominated(rows: Sequence[Row]) -> list[Row]:
    """The rows than which none of about the same bytes or fewer has a better mean, by growing bytes."""
    found: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["bytes_ratio"], -row["mean"], row["cell"])):
        rivals = [other["mean"] for other in rows if other["bytes_ratio"] <= EQUAL_BYTES * row["bytes_ratio"]]
        if row["mean"] == max(rivals) and (not found or row["mean"] > found[-1]["mean"]):
            found.append(row)
    return found


@drawn_alike
def frontier(cells: Sequence[Row], palette: Palette) -> Figure:
    """Mean of task means against cached bytes, 95% intervals; the frontier's cells are joined and named.

    Args:
        cells: rows of one model, one ``compress_at`` and one length; those with task "all" are drawn.
        palette: the report's styles.
    """
    rows = [cell for cell in cells if cell["task"] == "all"]
    best = non_dominated(rows)
    named = {row["cell"] for row in best}
    figure = Figure(figsize=(9.6, 6.0))
    axes = figure.subplots()
    axes.plot([row["bytes_ratio"] for row in best], [row["mean"] for row in best], color="#555555", zorder=2)
    for row in sorted(rows, key=lambda row: row["cell"]):
        style, on = palette[row["method"]], row["cell"] in named
        reach = np.maximum([[row["mean"] - row["low"]], [row["high"] - row["mean"]]], 0.0)
        axes.errorbar(
            [row["bytes_ratio"]],
            [row["mean"]],
            yerr=reach,
            color=style.colour,
            marker=style.marker,
            markersize=style.size * (1.25 if on else 1.0),
            elinewidth=1.0 if on else 0.7,
            alpha=1.0 if on else 0.75,
            linestyle="none",
            zorder=3 if on else 1,
        )
    for row in best:
        axes.annotate(
            row["cell"], (row["bytes_ratio"], row["mean"]), xytext=(4, 5), textcoords="offset points", fontsize=7.5
        )
    ratios = [row["bytes_ratio"] for row in rows]
    log_ticks(axes, [2.0**-halvings for halvings in range(9) if 2.0**-halvings >= min(ratios) / 1.1])
    axes.set_xlim(min(ratios) / 1.15, 1.3 * max(*ratios, 1.0))
    axes.set_ylim(-0.03, 1.05)
    axes.set_xlabel("cached bytes / bytes of the uncompressed cache")
    axes.set_ylabel("mean of task means")
    methods = sorted({row["method"] for row in rows} - {palette.baseline})
    if any(row["method"] == palette.baseline for row in rows):
        methods.insert(0, palette.baseline)
    handles = [palette.handle(method, linestyle="none") for method in methods]
    figure.legend(handles=handles, loc="outside right center", fontsize=8)
    return figure
