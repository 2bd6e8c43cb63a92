"""Fidelity: what compression does to each quantity of attention, layer by layer, and to the model's predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from kvgauge.report.plots.style import Palette, drawn_alike, grid, legend_above
from kvgauge.report.tables import fidelity_label, quantity_order

Row = dict[str, Any]

OF_VALUES = ("V", "VO")


@drawn_alike
def error_by_layer(fidelity: Sequence[Row], palette: Palette) -> Figure:
    """Relative Frobenius error against the layer, one column per quantity, one row per budget; means over sequences.

    Args:
        fidelity: rows of ``fidelity.json``.
        palette: the report's styles.
    """
    frame = _frame(fidelity)
    quantities = sorted(frame["quantity"].unique(), key=quantity_order)
    settings = sorted(frame["setting"].unique(), key=lambda setting: (-setting[0], -setting[1], setting[2]))
    figure, panels = grid(len(quantities) * len(settings), len(quantities), 2.2, 2.1, sharex=True, sharey="col")
    for place, axes in enumerate(panels):
        row, column = divmod(place, len(quantities))
        here = frame[(frame["quantity"] == quantities[column]) & (frame["setting"] == settings[row])]
        for (method, _), line in here.groupby(["method", "label"]):
            errors = line.groupby("layer")["error"].mean()
            style = palette[str(method)]
            axes.plot(errors.index, errors, color=style.colour, marker=style.marker, markersize=3, linewidth=1.2)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if row == 0:
            axes.set_title(quantities[column])
        if column == 0:
            axes.set_ylabel(settings[row][2])
    # A column shares its scale, which an end that is set keeps from growing: it is set when all is drawn.
    for quantity, axes in zip(quantities, panels, strict=False):
        _positive_scale(axes, frame.loc[frame["quantity"] == quantity, "error"])
    figure.supxlabel("layer", fontsize=10)
    legend_above(figure, set(frame["method"]), palette)
    return figure


@drawn_alike
def error_by_rank(fidelity: Sequence[Row], palette: Palette) -> Figure | None:
    """Error against the rank, one panel per quantity: mean over layers, the band its range over sequences.

    The rank is that of the values for V and VO, that of the keys for all others, each a mean over layers.

    Args:
        fidelity: rows of ``fidelity.json``; rows without a rank are left out.
        palette: the report's styles.

    Returns:
        None where no row has a rank.
    """
    frame = _frame(fidelity)
    frame["rank"] = frame["rank_v"].where(frame["quantity"].isin(OF_VALUES), frame["rank_k"])
    frame = frame[frame["rank"].notna()]
    if frame.empty:
        return None
    quantities = sorted(frame["quantity"].unique(), key=quantity_order)
    figure, panels = grid(len(quantities), 4, 2.8, 2.4)
    for quantity, axes in zip(quantities, panels, strict=True):
        here = frame[frame["quantity"] == quantity]
        for method, rows in here.groupby("method"):
            by_sequence = rows.groupby(["label", "sequence"])[["rank", "error"]].mean()
            line = by_sequence.groupby("label").agg({"rank": "mean", "error": ["mean", "min", "max"]})
            line.columns = pd.Index(["rank", "mean", "low", "high"])
            line = line.sort_values("rank")
            style = palette[str(method)]
            axes.plot(line["rank"], line["mean"], color=style.colour, marker=style.marker, markersize=style.size)
            axes.fill_between(line["rank"], line["low"], line["high"], color=style.colour, alpha=0.15, linewidth=0)
        _positive_scale(axes, here["error"])
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_title(quantity)
    figure.supxlabel("rank", fontsize=10)
    figure.supylabel("relative error", fontsize=10)
    legend_above(figure, set(frame["method"]), palette)
    return figure


@drawn_alike
def divergence(model: Sequence[Row], palette: Palette) -> Figure:
    """KL from the uncompressed model's predictions against cached bytes: lines the means, dots the sequences.

    Args:
        model: rows of ``model.json``; KL in nats per token.
        palette: the report's styles.
    """
    frame = pd.DataFrame.from_records([row for row in model if row["method"] != palette.baseline])
    frame["label"] = [fidelity_label(row) for row in model if row["method"] != palette.baseline]
    frame["ratio"] = frame["nbytes"] / frame["full_nbytes"]
    figure = Figure(figsize=(7.2, 4.2))
    axes = figure.subplots()
    for method, rows in frame.groupby("method"):
        style = palette[str(method)]
        line = rows.groupby("label")[["ratio", "kl"]].mean().sort_values("ratio")
        place = palette.apart(str(method), axes, rows["ratio"], rows["kl"])
        axes.plot(line["ratio"], line["kl"], color=style.colour, marker=style.marker, transform=place)
        axes.plot(
            rows["ratio"],
            rows["kl"],
            color=style.colour,
            marker=".",
            linestyle="none",
            markersize=3,
            alpha=0.6,
            transform=place,
        )
    _positive_scale(axes, frame["kl"])
    axes.set_xlabel("cached bytes / bytes of the uncompressed cache")
    axes.set_ylabel("KL to the uncompressed model [nats/token]")
    figure.legend(
        handles=[palette.handle(str(method)) for method in sorted(frame["method"].unique())], loc="outside right center"
    )
    return figure


def _frame(fidelity: Sequence[Row]) -> pd.DataFrame:
    frame = pd.DataFrame.from_records(list(fidelity))
    frame["label"] = [fidelity_label(row) for row in fidelity]
    frame["setting"] = [_setting(row) for row in fidelity]
    frame[["rank_k", "rank_v"]] = frame[["rank_k", "rank_v"]].apply(pd.to_numeric)
    return frame


def _setting(row: Row) -> tuple[float, int, str]:
    """What methods are compared at: the budget, or the ranks where there is no budget."""
    if row["budget"] is not None:
        return (float(row["budget"]), 0, f"budget {row['budget']:g}")
    # A cell of its own without a budget may have other ranks in every layer.
    if row.get("cell") or row["rank_k"] is None:
        return (0.0, 0, "no budget")
    return (-1.0, int(row["rank_k"]), f"ranks {row['rank_k']}, {row['rank_v']}")


def _positive_scale(axes: Axes, values: pd.Series[float]) -> None:
    """A logarithmic axis where values span more than a factor of ten, else one from zero."""
    positive = values[np.isfinite(values) & (values > 0)]
    if len(positive) and positive.max() > 10 * positive.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
