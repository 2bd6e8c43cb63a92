"""Depth and length: where in a context a fact is found again, a panel per cell."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from kvgauge.report.plots.style import SCORES, drawn_alike, grid


@drawn_alike
def needle(rows: pd.DataFrame) -> Figure:
    """One heat map per cell, all on the scale from 0 to 1; what was not measured stays grey.

    Args:
        rows: of `kvgauge.report.needle.needle_table`, of one model and one moment of compression.
    """
    lengths, depths = sorted(rows["length"].unique()), sorted(rows["depth"].unique())
    cells = list(dict.fromkeys(rows["cell"]))
    figure, panels = grid(len(cells), 4, 2.6, 0.9 + 0.17 * len(depths), sharex=True, sharey=True)
    for cell, axes in zip(cells, panels, strict=True):
        here = rows[rows["cell"] == cell].pivot(index="depth", columns="length", values="score")
        matrix = here.reindex(index=depths, columns=lengths).to_numpy(dtype=float)
        axes.set_facecolor("#bbbbbb")
        image = axes.imshow(matrix, cmap=SCORES, vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest")
        axes.grid(visible=False)
        axes.set_title(cell)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45, ha="right")
        axes.set_yticks(range(len(depths)), [f"{depth:.2g}" for depth in depths], fontsize=7)
    figure.supxlabel("context length [tokens]", fontsize=10)
    figure.supylabel("depth of the fact", fontsize=10)
    figure.colorbar(image, ax=panels, label="score", shrink=0.9, aspect=40)
    return figure
