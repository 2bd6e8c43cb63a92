"""Bytes of caches while they answer: shares, curves, and reports that leave the chapter out."""

from __future__ import annotations

import numpy as np
import pytest

from kvgauge.report import chapters, plots
from kvgauge.report.growth import COLUMNS, curve, growing, growth_table
from kvgauge.report.plots.style import Palette


def sample(cell: str, points: list[list[int]], full: int, *, budget: float | None = None, overrun: float | None = None):
    return {
        "model": "tiny",
        "compress_at": "context",
        "cell": cell,
        "method": cell.partition("@")[0],
        "budget": budget,
        "nbytes_written": points,
        "nbytes_end": points[-1][1],
        "nbytes_peak": max(size for _, size in points),
        "full_nbytes_end": full,
        "budget_overrun": overrun,
    }


SAMPLES = [
    sample("full", [[0, 1000], [300, 4000]], 4000),
    sample("full", [[0, 1000], [100, 2000]], 2000),
    sample("xkv@0.5~64", [[0, 400], [64, 900], [64, 700], [300, 1600]], 4000, budget=0.5, overrun=0.98),
    sample("xkv@0.5~64", [[0, 400], [64, 900], [64, 500], [100, 600]], 2000, budget=0.5, overrun=1.01),
]


def test_shares_are_those_of_the_uncompressed_cache_at_the_end():
    table = growth_table(growing(SAMPLES))
    assert list(table["cell"]) == ["full", "xkv@0.5~64"] and list(table["n"]) == [2, 2]
    row = table.iloc[1]
    assert row["written"] == 200
    assert row["start_bytes_ratio"] == pytest.approx((400 / 4000 + 400 / 2000) / 2)
    assert row["peak_bytes_ratio"] == pytest.approx((1600 / 4000 + 900 / 2000) / 2)
    assert row["end_bytes_ratio"] == pytest.approx((1600 / 4000 + 600 / 2000) / 2)
    assert row["overrun"] == 1.01 and np.isnan(table.iloc[0]["overrun"])


def test_a_curve_is_the_mean_of_the_answers_that_have_not_ended():
    tokens, sizes = curve(SAMPLES[2:])
    assert tokens[0] == 0 and tokens[-1] == 200  # the median of the answers' lengths
    at = dict(zip(tokens.tolist(), sizes.tolist(), strict=True))
    assert at[0] == 400 and at[63] == 400
    assert at[64] == (700 + 500) / 2  # what the compression has left
    assert at[100] == (700 + 600) / 2 and at[101] == 700


def test_short_answers_of_caches_that_compress_once_are_not_told():
    short = [sample("full", [[0, 10], [100, 20]], 20), sample("kqsvd@0.5", [[0, 5], [100, 10]], 20, budget=0.5)]
    assert growing(short) == []
    assert list(growth_table([]).columns) == COLUMNS
    assert growing([{"cell": "full", "score": 1.0}]) == []  # results from before growth was measured
    assert len(growing([*short, SAMPLES[2]])) == 3


def test_the_chapter_has_a_picture_and_a_table():
    draft, grown = chapters.Draft(), growing(SAMPLES)
    chapters.growth(draft, grown, growth_table(grown), Palette(["full", "xkv"]))
    [section] = draft.sections
    assert section.title == "While answering" and list(draft.pictures) == ["growth.png"]
    figure = plots.growth(grown, ["full", "xkv@0.5~64"], Palette(["full", "xkv"]))
    first, second = figure.axes
    assert (first.get_title(loc="left"), second.get_title(loc="left")) == ("full", "xkv@0.5~64")
    assert len(first.lines) == 1 and len(second.lines) == 3
    np.testing.assert_allclose(second.lines[1].get_ydata(), np.asarray(second.lines[0].get_ydata()) * 0.5)
