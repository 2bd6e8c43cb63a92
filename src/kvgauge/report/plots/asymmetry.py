"""The asymmetry of keys and values: how concentrated the projections are, and how alike neighbours are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kvgauge.report.plots.style import COLOURS, LINES, drawn_alike

COLOUR_OF = {
    "W_Q": COLOURS[2],
    "W_K": COLOURS[0],
    "W_V": COLOURS[1],
    "K": COLOURS[0],
    "K rotated": COLOURS[5],
    "V": COLOURS[1],
}


@drawn_alike
def asymmetry(rows: Sequence[dict[str, Any]]) -> Figure:
    """Effective ranks of the projections, their spectra, and cosines of adjacent and of distant tokens.

    Args:
        rows: of `kvgauge.measure.asymmetry.weight_rows` and `cosine_rows`.
    """
    frame = pd.DataFrame.from_records(list(rows))
    figure = Figure(figsize=(13.0, 3.6))
    ranks, spectra, cosines = figure.subplots(1, 3)
    for quantity, rows_of in frame[frame["effective_rank"].notna()].groupby("quantity", sort=False):
        colour = COLOUR_OF[str(quantity)]
        here = rows_of.sort_values("layer")
        ranks.plot(here["layer"], here["effective_rank"], color=colour, label=str(quantity))
        energy = pd.DataFrame(here["energy"].tolist()).mean(axis=0).cumsum()
        spectra.plot((energy.index + 1) / len(energy), energy, color=colour, label=str(quantity))
    ranks.set_title("effective rank of a head")
    ranks.set_ylabel("share of head_dim")
    spectra.set_title("spectral energy, mean of layers")
    spectra.set_xlabel("share of the directions, strongest first")
    spectra.set_ylabel("share of the energy")
    spectra.plot([0, 1], [0, 1], color="#999999", linestyle=":", linewidth=1, zorder=0)
    far = frame["distance"].max()
    for (name, distance), rows_of in frame[frame["cosine"].notna()].groupby(["quantity", "distance"], sort=False):
        here = rows_of.sort_values("layer")
        line = LINES[0] if distance < far else LINES[2]
        label = f"{name}, {'adjacent' if distance < far else f'{distance:g} apart'}"
        cosines.plot(here["layer"], here["cosine"], color=COLOUR_OF[str(name)], linestyle=line, label=label)
    cosines.set_title("cosine of two tokens")
    for axes in (ranks, cosines):
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ranks.legend()
    cosines.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
