"""What the interactive figures draw: a row per cell, and a legend of the methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from kvgauge.evaluation.statistics import format_interval
from kvgauge.report.plots.style import Palette
from kvgauge.report.tables import format_bytes, timed_cells

Row = dict[str, Any]

INK = "var(--ink)"  # of the page: the uncompressed cache is black on white and white on black
STAR = "M0,-1L0.24,-0.32L0.95,-0.31L0.38,0.12L0.59,0.81L0,0.4L-0.59,0.81L-0.38,0.12L-0.95,-0.31L-0.24,-0.32Z"
SALTIRE = (
    "M-0.7,-0.35L-0.35,-0.7L0,-0.35L0.35,-0.7L0.7,-0.35L0.35,0L0.7,0.35L0.35,0.7L0,0.35L-0.35,0.7L-0.7,0.35L-0.35,0Z"
)
# Matplotlib's marks under Vega's names, with sizes that look the same; what Vega has no name for is a path in the
# square from -1 to 1.
SHAPES = {
    "o": ("circle", 75),
    "s": ("square", 70),
    "D": ("diamond", 100),
    "^": ("triangle-up", 95),
    "v": ("triangle-down", 95),
    "P": ("cross", 95),
    "X": (SALTIRE, 130),
    "*": (STAR, 420),
}


def points(cells: Sequence[Row], latency: Sequence[Row], palette: Palette) -> list[Row]:
    """A row per cell: its score with the interval, its bytes, its times, its look, and what is said beside the mouse.

    Args:
        cells: rows of one comparison over all its lengths; those with task "all" are taken.
        latency: rows of the latency stage.
        palette: the report's styles.

    Returns:
        Rows with ``cell``, ``method``, ``budget``, ``mean``, ``low``, ``high`` and ``bytes_ratio`` as they came;
        ``tpot`` and ``ttft`` over those of the preallocated uncompressed cache, None where the cell was not timed;
        ``colour``, ``shape`` and ``size``; and ``lines``, pairs of a name and a text. A method's rows stand together,
        from the smallest budget to the largest, as a line is drawn through them.
    """
    timed = _timed(latency)
    found: list[Row] = []
    for cell in cells:
        if cell["task"] != "all":
            continue
        times = timed.get((cell["model"], cell["cell"]), timed.get(("", cell["cell"]), {}))
        point = {name: cell[name] for name in ("cell", "method", "budget", "mean", "low", "high", "bytes_ratio")}
        point |= {"tpot": times.get("tpot_over_static"), "ttft": times.get("ttft_over_static")}
        found.append(point | _look(cell["method"], palette) | {"lines": _lines(cell, times)})
    return sorted(found, key=lambda row: (row["method"], row["budget"] or 0.0, row["bytes_ratio"], row["cell"]))


def legend(rows: Sequence[Row], palette: Palette) -> list[Row]:
    """Method, colour and shape of every method of the rows, the uncompressed cache first, then the best first."""
    means: dict[str, list[float]] = {}
    for row in rows:
        means.setdefault(row["method"], []).append(row["mean"])
    order = sorted(
        means, key=lambda method: (method != palette.baseline, -sum(means[method]) / len(means[method]), method)
    )
    return [{"method": method} | _look(method, palette) for method in order]


def _look(method: str, palette: Palette) -> Row:
    style = palette[method]
    shape, size = SHAPES[style.marker]
    return {"colour": INK if method == palette.baseline else style.colour, "shape": shape, "size": size}


def _timed(latency: Sequence[Row]) -> dict[tuple[str, str], Row]:
    """What was timed, by model (empty where the rows do not name it) and cell, without what was not measured."""
    if not latency:
        return {}
    return {
        (str(row.get("model", "")), str(row["cell"])): {
            str(name): value for name, value in row.items() if not pd.isna(value)
        }
        for row in timed_cells(latency).to_dict("records")
    }


def _lines(cell: Row, times: Row) -> list[list[str]]:
    lines = [["score", format_interval(cell["mean"], cell["low"], cell["high"])]]
    if cell["diff"] is not None:
        lines.append(["difference from full", format_interval(cell["diff"], cell["diff_low"], cell["diff_high"])])
    lines.append(["bytes / full", f"{cell['bytes_ratio']:.3f}"])
    lines.append(["bytes per prompt", format_bytes(cell["nbytes"])])
    for name, key in (("TPOT / full", "tpot_over_static"), ("TTFT / full", "ttft_over_static")):
        if key in times:
            lines.append([name, f"{times[key]:.2f}"])
    if times:
        lines.append(["timed at", f"{int(times['context_length']):,} tokens, batch {int(times['batch'])}"])
    return lines
