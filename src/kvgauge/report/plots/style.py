"""One look for all figures: a colour and a marker per method, the same wherever the method is drawn.

The colours are those of Okabe & Ito (Color Universal Design, 2008) without black, which is the uncompressed cache's,
and without yellow, which is faint on white; two of Paul Tol's muted scheme follow. Colours and markers repeat with
different periods, so 56 methods differ in one or the other, and no two neighbours differ in colour alone.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import matplotlib.colors
import matplotlib.style
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation, Transform

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
LINES = ("-", "--", ":", "-.")
DPI = 144
# Of scores in heat maps: what is lost is red, what is kept blue, and the colour-blind tell them apart. The ends of the
# scale that it is taken from are too dark to write on.
SCORES = matplotlib.colors.LinearSegmentedColormap.from_list(
    "scores", matplotlib.colormaps["RdYlBu"](np.linspace(0.1, 0.9, 256))
)
LOOK: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": "#333333",
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "figure.constrained_layout.use": True,
}


# A decorator for what makes or saves figures, as settings are read at both times: the reader's own matplotlibrc must
# not change a picture.
drawn_alike = matplotlib.style.context(["default", LOOK])


@dataclass(frozen=True)
class Style:
    """How a method is drawn."""

    colour: str
    marker: str
    size: float = 5.5


class Palette:
    """Styles by method; the uncompressed cache is a black star.

    Args:
        methods: every method of the report, in any order.
        baseline: the uncompressed cache's name.
    """

    def __init__(self, methods: Iterable[str], baseline: str = "full") -> None:
        self.baseline = baseline
        self.methods = sorted(set(methods) - {baseline})
        self._styles = {
            method: Style(COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)])
            for index, method in enumerate(self.methods)
        }
        self._styles[baseline] = Style("#000000", "*", 12.0)

    def __getitem__(self, method: str) -> Style:
        return self._styles[method]

    def handle(self, method: str, **changes: Any) -> Line2D:
        """An entry for a legend."""
        style = self[method]
        look: dict[str, Any] = {
            "color": style.colour,
            "marker": style.marker,
            "markersize": style.size,
            "label": method,
        }
        if method == self.baseline:
            look["linestyle"] = "none"
        return Line2D([], [], **(look | changes))

    def apart(self, method: str, axes: Axes, x: npt.ArrayLike, y: npt.ArrayLike, points: float = 3.0) -> Transform:
        """The data transform moved sideways by a few points, so that methods at one place do not hide one another.

        Args:
            method: whose data are drawn.
            axes: where.
            x: shape (n,), the data.
            y: shape (n,), the data.
            points: distance between neighbouring methods; less where there are many.
        """
        # Artists that are moved take no part in the scaling of the axes, so the axes are told of the data here.
        axes.update_datalim(np.column_stack([np.asarray(x, dtype=float), np.asarray(y, dtype=float)]))
        axes.autoscale_view()
        if method == self.baseline:
            return axes.transData
        step = self.methods.index(method) - (len(self.methods) - 1) / 2
        reach = min(points, 24.0 / max(len(self.methods), 1))
        figure = axes.get_figure(root=True)
        assert figure is not None
        return axes.transData + ScaledTranslation(step * reach / 72, 0, figure.dpi_scale_trans)


def grid(
    panels: int, columns: int, width: float = 3.2, height: float = 2.6, **sharing: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of equal panels, the surplus places of the last row empty; width and height of a panel in inches."""
    columns = min(columns, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(width * columns + 0.6, height * rows + 0.7))
    axes = list(figure.subplots(rows, columns, squeeze=False, **sharing).flat)
    for index, surplus in enumerate(axes[panels:], start=panels):
        surplus.remove()
        # With shared axes only the lowest row has tick labels, and the panel above an empty place is the lowest there.
        axes[index - columns].tick_params(labelbottom=True)
    return figure, axes[:panels]


def log_ticks(axes: Axes, ticks: Sequence[float], form: str = ".3g", base: float = 10) -> None:
    """A logarithmic x axis with labels at `ticks`, in the format `form`, and nowhere else."""
    axes.set_xscale("log", base=base)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:{form}}"))
    axes.xaxis.set_minor_locator(NullLocator())


def legend_above(figure: Figure, methods: set[str], palette: Palette) -> None:
    """One legend for all panels, the uncompressed cache first."""
    order = [*([palette.baseline] if palette.baseline in methods else []), *sorted(methods - {palette.baseline})]
    width = figure.get_size_inches()[0]
    figure.legend(
        handles=[palette.handle(method) for method in order],
        loc="outside upper left",
        ncols=max(1, min(len(order), int(width / 1.3))),
    )


@drawn_alike
def to_png(figure: Figure) -> bytes:
    """The figure as PNG, the same bytes for the same figure: no date, no software version."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
