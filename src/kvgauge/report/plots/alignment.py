"""How alike layers are: token by token, and in the directions that dominate them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kvgauge.report.plots.style import drawn_alike

MEASURES = {
    "cosine": "cosine of the same token",
    "cka": "centred kernel alignment",
    "subspace": "dominant left singular subspaces",
}


@drawn_alike
def alignment(matrices: Mapping[str, npt.ArrayLike]) -> Figure:
    """One row of layer × layer heat maps per kind of state, one column per measure, all on one scale.

    Args:
        matrices: of `kvgauge.measure.alignment.layer_alignment`, by their names there.
    """
    kinds = list(dict.fromkeys(name.rsplit("_", 1)[0] for name in matrices))
    figure = Figure(figsize=(11.5, 0.6 + 3.4 * len(kinds)), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.15)  # type: ignore[union-attr, call-arg]
    rows = figure.subplots(len(kinds), len(MEASURES), squeeze=False)
    for kind, row in zip(kinds, rows, strict=True):
        for (measure, title), axes in zip(MEASURES.items(), row, strict=True):
            values = np.asarray(matrices[f"{kind}_{measure}"], dtype=np.float64)
            image = axes.imshow(values, cmap="cividis", vmin=0.0, vmax=1.0, interpolation="nearest")
            axes.grid(visible=False)
            axes.set_title(f"{kind}: {title}")
            axes.set_xlabel("layer")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        row[0].set_ylabel("layer")
        figure.colorbar(image, ax=list(row), shrink=0.9)
    return figure
