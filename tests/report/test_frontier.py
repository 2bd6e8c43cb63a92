from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from kvgauge.report import build_report, plots
from kvgauge.report.frontier import frontier_tables
from kvgauge.report.plots.frontier import non_dominated

Row = dict[str, Any]


def test_tables_say_who_dominates_whom(make_samples: Callable[..., list[Row]]) -> None:
    samples = make_samples(("xkv", "streamingllm"), (0.5, 0.25), (512,), 40)
    samples = [row | {"combination": row["method"] == "xkv"} for row in samples]
    tables = frontier_tables(samples)
    assert set(tables.points["cell"]) == {"full", "xkv@0.5", "xkv@0.25", "streamingllm@0.5", "streamingllm@0.25"}
    assert (tables.pairs["diff_low"] > 0).all()
    assert (tables.pairs["bytes_ratio"] <= tables.pairs["other_bytes_ratio"]).all()
    points = tables.points.set_index("cell")
    for pair in tables.pairs.itertuples():
        assert pair.cell in points.loc[pair.other, "dominated_by"].split(", ")
    assert points["dominates"].sum() == len(tables.pairs) > 0
    best = tables.best.set_index("budget")
    for kind, method in (("combination", "xkv"), ("published", "streamingllm")):
        assert best.loc[0.25, kind] == f"{method}@0.25"
        either = points.loc[[f"{method}@0.5", f"{method}@0.25"], "mean"]  # a quarter's cell is an answer for a half
        assert best.loc[0.5, kind] == either.idxmax()
    score = {cell: [row["score"] for row in samples if row["cell"] == cell] for cell in points.index}
    for cell in points.index:  # all tasks have as many samples
        assert points.loc[cell, "mean"] == pytest.approx(sum(score[cell]) / len(score[cell]))


def test_the_frontier_is_what_none_as_small_beats() -> None:
    cells = [("a", 0.1, 0.3), ("b", 0.2, 0.2), ("c", 0.2, 0.5), ("d", 0.5, 0.5), ("e", 1.0, 0.6)]
    drawn = [{"cell": name, "bytes_ratio": ratio, "mean": mean} for name, ratio, mean in cells]
    assert [row["cell"] for row in non_dominated(drawn)] == ["a", "c", "e"]


def test_the_figure_joins_and_names_the_frontier() -> None:
    row = {"task": "all", "low": 0.0, "high": 1.0, "length": 512}
    cells = [
        row | {"cell": "full", "method": "full", "bytes_ratio": 1.0, "mean": 0.8},
        row | {"cell": "xkv@0.5", "method": "xkv", "bytes_ratio": 0.5, "mean": 0.7},
        row | {"cell": "ksvd@0.5", "method": "ksvd", "bytes_ratio": 0.5, "mean": 0.4},
    ]
    figure = plots.frontier(cells, plots.Palette(["full", "xkv", "ksvd"]))
    [axes] = figure.axes
    assert axes.get_xscale() == "log"
    assert axes.lines[0].get_xydata().tolist() == [[0.5, 0.7], [1.0, 0.8]]
    assert {text.get_text() for text in axes.texts} == {"xkv@0.5", "full"}
    assert len(axes.containers) == 3  # every cell with its interval


def test_the_report_has_the_frontier(stages: dict[str, list[Path]], tmp_path: Path) -> None:
    index = build_report(**stages, out_dir=tmp_path / "out", provenance={})
    names = {path.name for path in index.parent.iterdir()}
    assert {"frontier.png", "frontier.csv", "frontier.md", "best.csv"} <= names
    assert len(pd.read_csv(index.parent / "frontier.csv")) == 5
    page = index.read_text()
    assert "Which cells dominate which" in page and "The best of each budget" in page
