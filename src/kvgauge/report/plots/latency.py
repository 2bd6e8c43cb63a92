"""Latency and memory: what a cell costs in time to the first token, in time per token, and at its peak."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvgauge.report.plots.style import LINES, Palette, drawn_alike, grid, log_ticks
from kvgauge.report.tables import latency_table

Row = dict[str, Any]

PANELS = {
    "ttft_s": ("time to first token [s]", 1.0),
    "tpot_median_s": ("time per token, median to p95 [ms]", 1e3),
    "tokens_per_s": ("output tokens per second", 1.0),
    "peak_bytes": ("peak memory [GiB]", 2.0**-30),
}


@drawn_alike
def latency_by_context(latency: Sequence[Row], palette: Palette) -> Figure:
    """A panel per quantity against context length, or bars where there is only one length.

    Args:
        latency: rows of one model and one batch size.
        palette: the report's styles.
    """
    frame = latency_table(latency)
    frame["smaller"] = -frame["budget"].fillna(np.inf)
    frame = frame.sort_values(["smaller", "method", "cell", "context_length"], ignore_index=True)
    lengths = sorted(frame["context_length"].unique())
    bars = len(lengths) == 1
    cells = list(frame["cell"].unique())
    # What was not measured, as the peak may not be, has no panel.
    shown = [name for name in PANELS if frame[name].notna().any()]
    figure, panels = grid(len(shown), 2, 4.2, 0.9 + 0.24 * len(cells) if bars else 2.8, sharey=bars)
    lines = {budget: LINES[index % len(LINES)] for index, budget in enumerate(frame["smaller"].unique())}
    for name, axes in zip(shown, panels, strict=True):
        title, scale = PANELS[name]
        axes.set_title(title)
        if bars:
            _bars(axes, frame, name, scale, palette)
        else:
            _lines(axes, frame, name, scale, palette, lines)
            log_ticks(axes, lengths, ",.0f", base=2)
            axes.set_ylim(0, 1.06 * axes.get_ylim()[1])
    if bars:
        figure.supxlabel(f"context of {int(lengths[0]):,} tokens", fontsize=10)
    else:
        figure.supxlabel("context length [tokens]", fontsize=10)
        heads = frame.drop_duplicates("cell")
        labels = zip(heads["method"].astype(str), heads["cell"].astype(str), heads["smaller"], strict=True)
        handles = [palette.handle(method, label=cell, linestyle=lines[smaller]) for method, cell, smaller in labels]
        figure.legend(handles=handles, loc="outside right center")
    return figure


def _lines(axes: Axes, frame: pd.DataFrame, name: str, scale: float, palette: Palette, lines: dict[Any, str]) -> None:
    for _, line in frame.groupby("cell", sort=False):
        head = line.iloc[0]
        style = palette[head["method"]]
        values = line[name] * scale
        place = palette.apart(head["method"], axes, line["context_length"], values, points=2.0)
        look: dict[str, Any] = {"color": style.colour, "transform": place}
        axes.plot(
            line["context_length"],
            values,
            marker=style.marker,
            markersize=style.size,
            linestyle=lines[head["smaller"]],
            **look,
        )
        if name == "tpot_median_s":
            p95 = np.maximum(line["tpot_p95_s"] * scale, values)
            palette.apart(head["method"], axes, line["context_length"], p95)
            axes.vlines(line["context_length"], values, p95, linewidth=0.9, alpha=0.7, **look)


def _bars(axes: Axes, frame: pd.DataFrame, name: str, scale: float, palette: Palette) -> None:
    places = np.arange(len(frame))[::-1]
    values = frame[name].to_numpy(dtype=float) * scale
    axes.barh(places, values, height=0.7, color=[palette[method].colour for method in frame["method"]])
    if name == "tpot_median_s":
        p95 = frame["tpot_p95_s"].to_numpy(dtype=float) * scale
        axes.hlines(places, values, np.maximum(p95, values), color="#333333", linewidth=1.0)
    axes.set_yticks(places, list(frame["cell"]))
    axes.grid(axis="y", visible=False)
