"""Scores by depth and length, and the chapter that shows them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from kvgauge.report import build_report, plots
from kvgauge.report.chapters import Draft, needle
from kvgauge.report.needle import needle_table
from kvgauge.report.page import HeatMaps

Row = dict[str, Any]


def sample(cell: str, length: int, depth: float | None, score: float, **changes: Any) -> Row:
    method, _, budget = cell.partition("@")
    row = {"model": "m", "compress_at": "context", "cell": cell, "method": method, "length": length, "score": score}
    return row | {"budget": float(budget) if budget else None, "depth": depth} | changes


SAMPLES = [
    sample("ksvd@0.25", 1024, 0.0, 0.5),
    sample("ksvd@0.5", 1024, 0.0, 1.0),
    sample("ksvd@0.5", 1024, 0.0, 0.0),
    sample("ksvd@0.5", 4096, 1.0, 0.25),
    sample("full", 1024, 0.0, 1.0),
    sample("full", 4096, 1.0, 1.0),
]


def test_means_by_depth_and_length_the_uncompressed_cache_first() -> None:
    table = needle_table(SAMPLES)
    assert list(dict.fromkeys(table["cell"])) == ["full", "ksvd@0.5", "ksvd@0.25"]
    rows = table.set_index(["cell", "length", "depth"])
    assert rows.loc[("ksvd@0.5", 1024, 0.0), ["n", "score"]].tolist() == [2, 0.5]
    assert rows.loc[("ksvd@0.5", 4096, 1.0), "score"] == 0.25
    assert len(table) == 5


def test_samples_without_a_depth_do_not_count() -> None:
    bare = [{name: value for name, value in row.items() if name != "depth"} for row in SAMPLES]
    assert needle_table(bare).empty
    assert needle_table([*bare, sample("full", 1024, None, 1.0)]).empty
    pd.testing.assert_frame_equal(needle_table([*SAMPLES, *bare]), needle_table(SAMPLES))


def test_many_depths_are_gathered_to_tenths() -> None:
    table = needle_table([sample("full", 1024, place / 100, 1.0) for place in range(101)])
    assert table["depth"].tolist() == pytest.approx(np.linspace(0, 1, 11))
    assert table["n"].sum() == 101


def test_a_heat_map_per_cell_with_its_gaps() -> None:
    draft = Draft()
    needle(draft, needle_table(SAMPLES))
    [chapter] = draft.sections
    [block] = chapter.blocks
    assert isinstance(block, HeatMaps)
    full, half, quarter = block.maps
    assert (full.title, full.columns, full.rows) == ("full", ["1K", "4K"], [("0", [1.0, None]), ("1", [None, 1.0])])
    assert half.rows == [("0", [0.5, None]), ("1", [None, 0.25])]
    assert (half.note, quarter.note) == ("0.42 on 3 samples", "0.50 on 1 samples")
    assert list(draft.pictures) == ["needle.png"]


def test_the_picture_draws_the_same_scores() -> None:
    figure = plots.needle(needle_table(SAMPLES))
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.images}
    assert set(panels) == {"full", "ksvd@0.5", "ksvd@0.25"}
    drawn = np.ma.filled(panels["ksvd@0.5"].images[0].get_array(), np.nan)
    np.testing.assert_array_equal(drawn, [[0.5, np.nan], [np.nan, 0.25]])
    assert {axes.images[0].get_clim() for axes in panels.values()} == {(0.0, 1.0)}


def test_the_report_has_the_chapter_only_where_samples_have_depths(
    tmp_path: Path, make_samples: Callable[..., list[Row]], write_evaluate: Callable[[Path, list[Row]], Path]
) -> None:
    plain = make_samples(("kqsvd",), (0.5,), (512,), 3)
    deep = [row | {"depth": 0.5} for row in plain]
    without, with_depth = (
        build_report([write_evaluate(tmp_path / name, rows)], [], [], tmp_path / f"{name}-page", {})
        for name, rows in (("plain", plain), ("deep", deep))
    )
    assert 'id="needle"' not in without.read_text()
    assert not list(without.parent.glob("needle*"))
    assert 'id="needle"' in with_depth.read_text()
    assert {path.name for path in with_depth.parent.glob("needle*")} == {"needle.png", "needle.csv", "needle.md"}
