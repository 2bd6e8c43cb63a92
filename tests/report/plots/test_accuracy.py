"""What the accuracy figures draw is what the rows say."""

from __future__ import annotations

from typing import Any

import pytest

from kvgauge.report import plots
from kvgauge.report.plots.frontier import non_dominated

Row = dict[str, Any]


def cell(method: str, budget: float | None, mean: float, **changes: Any) -> Row:
    row = {
        "cell": method if budget is None else f"{method}@{budget:g}",
        "method": method,
        "budget": budget,
        "task": "all",
        "length": 1024,
        "mean": mean,
        "low": mean - 0.1,
        "high": mean + 0.1,
        "diff": None if budget is None else mean - 0.8,
        "diff_low": None if budget is None else mean - 0.9,
        "diff_high": None if budget is None else mean - 0.7,
        "bytes_ratio": 1.0 if budget is None else budget,
    }
    return row | changes


CELLS = [
    cell("full", None, 0.8),
    cell("xkv", 0.5, 0.75),
    cell("xkv", 0.25, 0.62),
    cell("ksvd", 0.5, 0.7, bytes_ratio=0.49),
    cell("ksvd", 0.25, 0.65),
    cell("kvslimmer", 0.3, 0.55),
]


def test_frontier_leaves_out_what_is_beaten_at_the_same_bytes() -> None:
    assert [(row["bytes_ratio"], row["mean"]) for row in non_dominated(CELLS)] == [
        (0.25, 0.65),
        (0.5, 0.75),
        (1.0, 0.8),
    ]


def test_pareto_draws_every_mean_with_its_interval() -> None:
    axes = plots.pareto(CELLS, plots.Palette({row["method"] for row in CELLS})).axes[0]
    drawn = {
        tuple(map(float, point)): tuple(float(end) for end in bar[:, 1])
        for container in axes.containers
        for point, bar in zip(container[0].get_xydata(), container[2][0].get_segments(), strict=True)
    }
    expected = {(row["bytes_ratio"], row["mean"]): (row["low"], row["high"]) for row in CELLS}
    assert drawn.keys() == expected.keys()
    assert all(drawn[point] == pytest.approx(expected[point]) for point in expected)


def test_pareto_names_the_budgets_and_the_methods() -> None:
    figure = plots.pareto(CELLS, plots.Palette({row["method"] for row in CELLS}))
    assert {text.get_text() for text in figure.axes[0].texts} == {"0.5", "0.3", "0.25", "budget"}
    # By the mean over budgets, the uncompressed cache first.
    assert [text.get_text() for text in figure.legends[0].texts] == ["full", "xkv", "ksvd", "kvslimmer"]


def test_one_panel_per_task() -> None:
    cells = [cell("ksvd", 0.5, 0.5, task=task) for task in ("all", "vt", "cwe")]
    figure = plots.pareto_by_task(cells, plots.Palette(["ksvd"]))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["cwe", "vt"]


def test_differences_are_hollow_where_the_interval_holds_zero() -> None:
    cells = [cell("ksvd", 0.5, 0.5), cell("xkv", 0.5, 0.85)]
    axes = plots.differences(cells, plots.Palette(["ksvd", "xkv"])).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ksvd@0.5", "xkv@0.5"]
    faces = [line.get_markerfacecolor() for line in axes.lines if len(line.get_xydata()) == 1]
    assert faces[1] == "white"
    assert faces[0] != "white"


def test_bytes_are_stacked_to_their_sum() -> None:
    samples = [
        {"cell": "ksvd@0.5", "method": "ksvd", "budget": 0.5, "full_nbytes": 100, "nbytes_by_part": parts}
        for parts in ({"keys": 20, "values": 30}, {"keys": 10, "values": 20, "tail": 20})
    ]
    axes = plots.bytes_by_part(samples, plots.Palette(["ksvd"])).axes[0]
    widths = {container.get_label(): container[0].get_width() for container in axes.containers}
    assert widths == pytest.approx({"keys": 0.15, "values": 0.25, "tail": 0.1})


def test_accuracy_by_length_has_a_panel_per_budget() -> None:
    cells = [cell("ksvd", budget, 0.5, length=length) for budget in (0.5, 0.25) for length in (1024, 4096)]
    cells += [cell("full", None, 0.8, length=length) for length in (None, 1024, 4096)]
    figure = plots.accuracy_by_length(cells, plots.Palette(["ksvd"]))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["budget 0.5", "budget 0.25"]
