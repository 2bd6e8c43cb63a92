"""Errors are averaged as said, against the rank of the right side."""

from __future__ import annotations

from typing import Any

import pytest

from kvgauge.report import plots

Row = dict[str, Any]


def error(quantity: str, value: float, **changes: Any) -> Row:
    row = {
        "method": "ksvd",
        "budget": 0.5,
        "rank_k": 8,
        "rank_v": 4,
        "layer": 0,
        "quantity": quantity,
        "error": value,
        "sequence": 0,
    }
    return row | changes


def test_error_by_layer_is_the_mean_over_sequences() -> None:
    rows = [
        error("K", value, layer=layer, sequence=s) for layer in (0, 1) for s, value in enumerate((0.1, 0.3 + layer))
    ]
    axes = plots.error_by_layer(rows, plots.Palette(["ksvd"])).axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[0.0, pytest.approx(0.2)], [1.0, pytest.approx(0.7)]]


def test_error_by_layer_hides_no_error_of_a_lower_row() -> None:
    rows = [error("K", value, budget=budget) for budget, value in ((0.75, 0.2), (0.5, 0.3), (0.25, 0.9))]
    for axes in plots.error_by_layer(rows, plots.Palette(["ksvd"])).axes:
        [[_, value]] = axes.lines[0].get_xydata().tolist()
        low, high = axes.get_ylim()
        assert low <= value <= high


def test_a_cell_with_ranks_by_layer_is_one_line_and_ranks_have_their_rows() -> None:
    adaptive = [error("K", 0.1, layer=n, rank_k=8 + n, budget=None, cell="ksvd@eps0.1") for n in (0, 1)]
    swept = [error("K", 0.1, layer=n, rank_k=rank, budget=None) for n in (0, 1) for rank in (8, 16)]
    axes = plots.error_by_layer(adaptive + swept, plots.Palette(["ksvd"])).axes
    assert [panel.get_ylabel() for panel in axes] == ["no budget", "ranks 16, 4", "ranks 8, 4"]
    assert [len(panel.lines[0].get_xdata()) for panel in axes] == [2, 2, 2]


def test_error_by_rank_uses_the_rank_of_keys_or_values() -> None:
    rows = [error(quantity, 0.2, **ranks) for quantity in ("K", "VO") for ranks in ({}, {"budget": 1, "rank_k": 16})]
    figure = plots.error_by_rank(rows, plots.Palette(["ksvd"]))
    assert figure is not None
    ranks = {axes.get_title(loc="left"): list(axes.lines[0].get_xdata()) for axes in figure.axes}
    assert ranks == {"K": [8, 16], "VO": [4, 4]}


def test_no_ranks_no_figure() -> None:
    assert plots.error_by_rank([error("K", 0.2, rank_k=None, rank_v=None)], plots.Palette(["ksvd"])) is None


def test_divergence_shows_every_sequence_and_the_mean() -> None:
    rows = [
        {"method": "ksvd", "budget": 0.5, "rank_k": 8, "rank_v": 8, "kl": kl, "nbytes": 50, "full_nbytes": 100}
        for kl in (0.1, 0.3)
    ]
    axes = plots.divergence(rows, plots.Palette(["ksvd"])).axes[0]
    mean, sequences = axes.lines
    assert mean.get_xydata().tolist() == [[0.5, pytest.approx(0.2)]]
    assert sequences.get_ydata().tolist() == [0.1, 0.3]
    assert axes.get_xlim()[0] < 0.5 < axes.get_xlim()[1]
    assert axes.get_ylim()[1] >= 0.3
