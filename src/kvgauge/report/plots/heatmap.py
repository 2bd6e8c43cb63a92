"""A matrix as a picture, e.g. how alike layers are."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kvgauge.report.plots.style import drawn_alike


@drawn_alike
def heatmap(
    matrix: npt.ArrayLike,
    title: str,
    xlabel: str = "layer",
    ylabel: str = "layer",
    value: str = "",
    limits: tuple[float, float] | None = None,
    diverging: bool = False,
) -> Figure:
    """A matrix as cells of colour, row 0 at the top.

    Args:
        matrix: shape (rows, columns), e.g. layer x layer; NaN cells stay grey.
        title: what is shown.
        xlabel: what the columns are.
        ylabel: what the rows are.
        value: what the colours stand for, with the unit.
        limits: values of the two ends of the colour scale; the range of the matrix if left out, symmetric around zero
            if `diverging`.
        diverging: whether the sign matters.

    Raises:
        ValueError: `matrix` is not a matrix, or has no finite value and there are no limits.
    """
    values = np.asarray(matrix, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f"a heat map needs a matrix, not shape {values.shape}")
    if limits is None:
        finite = values[np.isfinite(values)]
        if not finite.size:
            raise ValueError("a heat map of no finite values needs limits")
        extreme = float(np.abs(finite).max())
        limits = (-extreme, extreme) if diverging else (float(finite.min()), float(finite.max()))
    rows, columns = values.shape
    figure = Figure(figsize=(min(8.0, 2.4 + 0.22 * columns), min(7.0, 1.6 + 0.22 * rows)))
    axes = figure.subplots()
    axes.set_facecolor("#bbbbbb")
    image = axes.imshow(
        values, cmap="RdBu_r" if diverging else "cividis", vmin=limits[0], vmax=limits[1], interpolation="nearest"
    )
    axes.grid(visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    figure.colorbar(image, ax=axes, label=value, shrink=0.85)
    return figure
