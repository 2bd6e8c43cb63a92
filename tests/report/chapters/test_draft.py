"""Drawings keep their look in a page at a fraction of their size, and their file is whole."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from kvgauge.report import plots
from kvgauge.report.chapters import Draft


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=np.int16)


def test_a_drawing_in_the_page_is_smaller_and_looks_the_same() -> None:
    rows = [
        {"cell": f"{method}@0.5", "method": method, "budget": 0.5, "task": "all", "length": 1} for method in "abcdef"
    ]
    rows = [row | {"mean": place / 6, "low": 0.0, "high": 1.0, "bytes_ratio": 0.5} for place, row in enumerate(rows)]
    figure = plots.pareto(rows, plots.Palette("abcdef"))
    draft = Draft()
    block = draft.figure("pareto", figure, "P", "c")
    assert draft.pictures == {"pareto.png": plots.to_png(figure)}
    assert block.png is not None
    assert len(block.png) < 0.7 * len(draft.pictures["pareto.png"])
    apart = np.abs(pixels(block.png) - pixels(draft.pictures["pareto.png"]))
    assert apart.mean() < 0.5 and apart.max() < 64
    assert draft.figure("again", figure, "P", "c").png == block.png
