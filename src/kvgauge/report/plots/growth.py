"""What caches take while they answer: bytes against tokens written, a panel per cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from kvgauge.report.growth import curve
from kvgauge.report.plots.style import Palette, drawn_alike, grid

Row = dict[str, Any]

MIB = 2.0**20


@drawn_alike
def growth(samples: Sequence[Row], cells: Sequence[str], palette: Palette) -> Figure:
    """A panel per cell, all on one scale: its bytes, those of the uncompressed cache, and what its budget allows.

    Args:
        samples: of `kvgauge.report.growth.growing`, of one model and one moment of compression.
        cells: in the order of the panels.
        palette: the report's styles.
    """
    of_cell = {cell: [row for row in samples if row["cell"] == cell] for cell in cells}
    full = next((curve(rows) for rows in of_cell.values() if rows[0]["method"] == palette.baseline), None)
    figure, panels = grid(len(cells), 4, 2.6, 1.9, sharex=True, sharey=True)
    for (cell, rows), axes in zip(of_cell.items(), panels, strict=True):
        tokens, sizes = curve(rows)
        axes.set_title(cell)
        if full is not None and rows[0]["method"] != palette.baseline:
            axes.plot(full[0], full[1] / MIB, color=palette[palette.baseline].colour, linewidth=0.9)
            if rows[0]["budget"] is not None:
                allowed = full[1] / MIB * rows[0]["budget"]
                axes.plot(full[0], allowed, color="#777777", linestyle=":", linewidth=1.2)
        axes.plot(tokens, sizes / MIB, color=palette[rows[0]["method"]].colour)
        axes.set_ylim(bottom=0)
    figure.supxlabel("tokens of the answer", fontsize=10)
    figure.supylabel("cached bytes [MiB]", fontsize=10)
    return figure
