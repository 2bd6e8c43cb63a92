"""Accuracy against bytes: what every method keeps of the uncompressed cache's answers, and what it saves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvgauge.report.plots.frontier import non_dominated
from kvgauge.report.plots.style import LINES, Palette, drawn_alike, grid, legend_above, log_ticks
from kvgauge.report.tables import task_names

Row = dict[str, Any]

TICKS = tuple(share * 2.0**-halvings for halvings in range(7) for share in (1.0, 0.75))
PARTS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#D55E00", "#999933", "#882255", "#888888")


@drawn_alike
def pareto(cells: Sequence[Row], palette: Palette) -> Figure:
    """Mean of task means against cached bytes, with intervals, budgets and the frontier of what no cell beats.

    Args:
        cells: rows of one model, one ``compress_at`` and one length; those with task "all" are drawn.
        palette: the report's styles.
    """
    rows = [cell for cell in cells if cell["task"] == "all"]
    figure = Figure(figsize=(8.4, 4.8))
    axes = figure.subplots()
    _pareto(axes, rows, palette)
    budgets = sorted({row["budget"] for row in rows if row["budget"] is not None})
    last = np.inf
    for budget in reversed(budgets):
        # Budgets that stand too near to be told apart share the label of the larger.
        if last / budget > 1.06:
            axes.annotate(
                f"{budget:g}",
                (budget, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                color="#777777",
                fontsize=8,
            )
            last = budget
    if budgets:
        axes.annotate(
            "budget",
            (0.0, 1.0),
            xycoords="axes fraction",
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            color="#777777",
            fontsize=8,
        )
    axes.set_xlabel("cached bytes / bytes of the uncompressed cache")
    axes.set_ylabel("mean of task means")
    means = {method: [row["mean"] for row in rows if row["method"] == method] for method in palette.methods}
    order = sorted((method for method in means if means[method]), key=lambda method: -float(np.mean(means[method])))
    if any(row["method"] == palette.baseline for row in rows):
        order.insert(0, palette.baseline)
    figure.legend(handles=[palette.handle(method) for method in order], loc="outside right center")
    return figure


@drawn_alike
def pareto_by_task(cells: Sequence[Row], palette: Palette) -> Figure:
    """The same as `pareto` for every task, on common axes."""
    tasks = task_names(cells)
    figure, panels = grid(len(tasks), 4, sharex=True, sharey=True)
    for task, axes in zip(tasks, panels, strict=True):
        _pareto(axes, [cell for cell in cells if cell["task"] == task], palette, tick_distance=2.0)
        axes.set_title(task)
    figure.supxlabel("cached bytes / bytes of the uncompressed cache", fontsize=10)
    figure.supylabel("mean score", fontsize=10)
    legend_above(figure, {cell["method"] for cell in cells}, palette)
    return figure


@drawn_alike
def accuracy_by_length(cells: Sequence[Row], palette: Palette) -> Figure:
    """Mean of task means against context length, one panel per budget, the uncompressed cache in each.

    Args:
        cells: rows of one model and one ``compress_at``, of several lengths.
        palette: the report's styles.
    """
    rows = [cell for cell in cells if cell["task"] == "all" and cell["length"] is not None]
    full = [row for row in rows if row["method"] == palette.baseline]
    others = [row for row in rows if row["method"] != palette.baseline]
    budgets = sorted({row["budget"] for row in others}, key=lambda budget: -np.inf if budget is None else -budget)
    figure, panels = grid(max(len(budgets), 1), 4, sharey=True, sharex=True)
    lengths = sorted({row["length"] for row in rows})
    for budget, axes in zip(budgets or [None], panels, strict=True):
        shown = [row for row in others if row["budget"] == budget]
        for method in sorted({row["method"] for row in shown}):
            line = sorted((row for row in shown if row["method"] == method), key=lambda row: row["length"])
            _line(axes, line, "length", palette, method)
        _line(axes, sorted(full, key=lambda row: row["length"]), "length", palette, palette.baseline, linestyle=":")
        log_ticks(axes, lengths, ",.0f", base=2)
        axes.set_ylim(-0.03, 1.05)
        axes.set_title("no budget" if budget is None else f"budget {budget:g}")
    figure.supxlabel("context length [tokens]", fontsize=10)
    figure.supylabel("mean of task means", fontsize=10)
    legend_above(figure, {row["method"] for row in rows}, palette)
    return figure


@drawn_alike
def differences(
    cells: Sequence[Row], palette: Palette, axis: str = "mean score minus that of the uncompressed cache, same samples"
) -> Figure:
    """Paired differences with their intervals, cell by cell, the smallest budget lowest.

    Args:
        cells: rows of one model, one ``compress_at`` and one length; those with task "all" and a difference are drawn.
        palette: the report's styles.
        axis: what the differences are.
    """
    rows = [cell for cell in cells if cell["task"] == "all" and cell["diff"] is not None]
    rows.sort(key=lambda row: (np.inf if row["budget"] is None else row["budget"], row["diff"], row["cell"]))
    figure = Figure(figsize=(7.2, 1.1 + 0.27 * len(rows)))
    axes = figure.subplots()
    axes.axvline(0.0, color="#000000", linewidth=1.0)
    for place, row in enumerate(rows):
        style = palette[row["method"]]
        # A hollow mark: the interval holds zero.
        hollow = row["diff_low"] <= 0.0 <= row["diff_high"]
        axes.plot([row["diff_low"], row["diff_high"]], [place, place], color=style.colour)
        axes.plot(row["diff"], place, style.marker, color=style.colour, markerfacecolor="white" if hollow else None)
    axes.set_yticks(range(len(rows)), [row["cell"] for row in rows])
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(axis)
    return figure


@drawn_alike
def bytes_by_part(samples: Sequence[Row], palette: Palette) -> Figure:
    """What the cached bytes are made of, cell by cell, as shares of the uncompressed cache's bytes.

    Args:
        samples: rows of one model, one ``compress_at`` and one length.
        palette: the report's styles; the uncompressed cache is left out.
    """
    shares: dict[str, dict[str, list[float]]] = {}
    budgets: dict[str, float] = {}
    for sample in samples:
        if sample["method"] != palette.baseline:
            parts = shares.setdefault(sample["cell"], {})
            budgets[sample["cell"]] = np.inf if sample["budget"] is None else sample["budget"]
            for part, nbytes in sample["nbytes_by_part"].items():
                parts.setdefault(part, []).append(nbytes / sample["full_nbytes"])
    counts = {cell: max(len(values) for values in parts.values()) for cell, parts in shares.items() if parts}
    names = sorted({part for parts in shares.values() for part in parts})
    order = sorted(counts, key=lambda cell: (budgets[cell], cell))
    figure = Figure(figsize=(7.6, 1.2 + 0.27 * len(order)))
    axes = figure.subplots()
    left = np.zeros(len(order))
    for index, name in enumerate(names):
        width = np.array([sum(shares[cell].get(name, [0.0])) / counts[cell] for cell in order])
        axes.barh(range(len(order)), width, left=left, height=0.7, color=PARTS[index % len(PARTS)], label=name)
        left += width
    for budget in sorted(set(budgets.values()) - {np.inf}):
        axes.axvline(budget, color="#777777", linewidth=0.8, linestyle=(0, (2, 2)))
    axes.set_yticks(range(len(order)), order)
    axes.set_ylim(-0.7, len(order) - 0.3)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("bytes / bytes of the uncompressed cache (dashed: the budgets)")
    figure.legend(loc="outside right center")
    return figure


def _pareto(axes: Axes, rows: Sequence[Row], palette: Palette, tick_distance: float = 1.3) -> None:
    full = [row for row in rows if row["method"] == palette.baseline]
    for row in full:
        axes.axhspan(row["low"], row["high"], color="#000000", alpha=0.05, linewidth=0)
        axes.axhline(row["mean"], color="#000000", linewidth=0.8, linestyle=(0, (1, 2)))
    frontier = [(row["bytes_ratio"], row["mean"]) for row in non_dominated(rows)]
    if len(frontier) > 1:
        axes.step(*zip(*frontier, strict=True), where="post", color="#bbbbbb", linewidth=5, alpha=0.5, zorder=1)
    for budget in {row["budget"] for row in rows} - {None}:
        axes.axvline(budget, color="#cccccc", linewidth=0.8, zorder=0.5)
    for method in sorted({row["method"] for row in rows}):
        line = sorted((row for row in rows if row["method"] == method), key=lambda row: row["bytes_ratio"])
        _line(axes, line, "bytes_ratio", palette, method)
    axes.grid(axis="x", visible=False)
    smallest = min(row["bytes_ratio"] for row in rows)
    kept: list[float] = []
    for tick in TICKS:
        if tick >= smallest / 1.1 and (not kept or kept[-1] / tick >= tick_distance):
            kept.append(tick)
    log_ticks(axes, kept)
    axes.set_xlim(min(smallest, 0.8) / 1.15, 1.15 * max(1.0, *(row["bytes_ratio"] for row in rows)))
    axes.set_ylim(-0.03, 1.05)


def _line(axes: Axes, rows: Sequence[Row], x: str, palette: Palette, method: str, linestyle: str = LINES[0]) -> None:
    """A method's means with their intervals, joined."""
    style = palette[method]
    mean = np.array([row["mean"] for row in rows])
    distance = np.array([[row["mean"] - row["low"] for row in rows], [row["high"] - row["mean"] for row in rows]])
    place = [row[x] for row in rows]
    axes.errorbar(
        place,
        mean,
        yerr=np.maximum(distance, 0.0),
        color=style.colour,
        marker=style.marker,
        markersize=style.size,
        linestyle=linestyle,
        elinewidth=1.0,
        markeredgecolor="white",
        markeredgewidth=0.6,
        zorder=3,
        transform=palette.apart(method, axes, place, mean),
    )
