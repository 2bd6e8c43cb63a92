"""How time, bytes and memory grow with the context: fitted exponents and a figure.

    python -m pipelines.studies.scaling artifacts/latency/<run>

Reads a run of the latency stage over several context lengths and writes ``scaling.json`` and ``scaling.png`` beside its
``latency.json``. Two fits per quantity y over the context length T: ``y = c T^p`` by least squares in logarithms, whose
exponent p is the growth over the measured range, and ``y = a + b T``, which separates what the context has no part in
(weights, overhead) from what each token costs.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from kvgauge.artifacts import add_files, read_json, replacing, write_json
from kvgauge.errors import UserError
from kvgauge.report.plots.style import DPI, Palette, drawn_alike
from kvgauge.stage import fail

QUANTITIES = {
    "ttft_s": "time to first token (s)",
    "tpot_median_s": "time per output token (s)",
    "nbytes": "cached bytes",
    "peak_bytes": "peak memory beyond the weights (bytes)",
}


@dataclass(frozen=True)
class Growth:
    """Fits of one quantity of one cell.

    Attributes:
        cell, batch, quantity: what was measured.
        points: context lengths that entered.
        exponent: p of ``c T^p``.
        r_squared: share of the variance of log y that the power law explains.
        constant, per_token: a and b of ``a + b T``.
    """

    cell: str
    batch: int
    quantity: str
    points: int
    exponent: float
    r_squared: float
    constant: float
    per_token: float


def power_law(lengths: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """The exponent of ``y = c T^p`` and the R² in logarithms.

    Raises:
        ValueError: fewer than two different lengths, or a value that is not positive.
    """
    if len(set(lengths)) < 2 or min(values) <= 0:
        raise ValueError("a power law needs two different lengths and positive values")
    x, y = np.log(np.asarray(lengths, dtype=float)), np.log(np.asarray(values, dtype=float))
    slope, intercept = np.polyfit(x, y, 1)
    spread = float(((y - y.mean()) ** 2).sum())
    left = float(((y - slope * x - intercept) ** 2).sum())
    return float(slope), 1.0 if spread == 0 else 1.0 - left / spread


def growths(rows: Sequence[Mapping[str, Any]]) -> list[Growth]:
    """The fits of all cells, batch sizes and quantities of a latency run that cover two or more context lengths."""
    found = []
    for (cell, batch, quantity), points in _series(rows).items():
        lengths, values = zip(*points, strict=True)
        if len(set(lengths)) < 2 or min(values) <= 0:
            continue
        exponent, r_squared = power_law(lengths, values)
        per_token, constant = np.polyfit(lengths, values, 1)
        found.append(Growth(cell, batch, quantity, len(points), exponent, r_squared, float(constant), float(per_token)))
    return found


def _series(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int, str], list[tuple[int, float]]]:
    series: dict[tuple[str, int, str], list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        for quantity in QUANTITIES:
            value = row.get(quantity)
            if value is not None and quantity == "peak_bytes":
                value -= row["before_bytes"]
            if value is not None:
                series[row["cell"], row["batch"], quantity].append((row["context_length"], value))
    return {key: sorted(points) for key, points in series.items()}


@drawn_alike
def figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Every quantity against the context length, both axes logarithmic; a line per cell and batch size."""
    series = _series(rows)
    shown = [quantity for quantity in QUANTITIES if any(key[2] == quantity for key in series)]
    palette = Palette({key[0] for key in series})
    batches = sorted({key[1] for key in series})
    drawing = Figure(figsize=(4.2 * len(shown), 3.6))
    for index, quantity in enumerate(shown):
        axes = drawing.add_subplot(1, len(shown), index + 1)
        for (cell, batch, name), points in sorted(series.items()):
            if name == quantity:
                style = palette[cell]
                line = ("-", "--", ":", "-.")[batches.index(batch) % 4]
                axes.plot(
                    *zip(*points, strict=True),
                    color=style.colour,
                    marker=style.marker,
                    linestyle=line,
                    label=f"{cell}, batch {batch}",
                )
        axes.set(xscale="log", yscale="log", xlabel="context length (tokens)", title=QUANTITIES[quantity])
        if index == 0:
            axes.legend(fontsize=7)
    return drawing


@drawn_alike
def write(directory: Path) -> list[Growth]:
    """Fit and draw the latency run in `directory`; writes ``scaling.json`` and ``scaling.png`` there.

    Raises:
        UserError: there is no latency run, or it has one context length only.
    """
    rows = read_json(directory / "latency.json")
    found = growths(rows)
    if not found:
        raise UserError(f"{directory} has one context length only: run latency with several latency.context_lengths")
    write_json(directory / "scaling.json", [asdict(growth) for growth in found])
    with replacing(directory / "scaling.png") as scratch:
        figure(rows).savefig(scratch, format="png", dpi=DPI, metadata={"Software": None})
    add_files(directory, "scaling.json", "scaling.png")
    return found


def main() -> None:
    """The command of the module docstring; the last line on stdout is JSON."""
    parser = argparse.ArgumentParser(description="Fit how a latency run grows with the context.")
    parser.add_argument("directory", type=Path, help="output directory of the latency stage")
    directory = parser.parse_args().directory
    try:
        found = write(directory)
    except UserError as error:
        fail(str(error))
    print(json.dumps({"directory": str(directory), "growth": [asdict(growth) for growth in found]}))


if __name__ == "__main__":
    main()
