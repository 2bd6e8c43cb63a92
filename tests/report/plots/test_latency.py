"""Lines against the context length, bars where there is one length."""

from __future__ import annotations

from typing import Any

import pytest

from kvgauge.report import plots

Row = dict[str, Any]


def timing(method: str, context_length: int, tpot: float) -> Row:
    return {
        "cell": method,
        "method": method,
        "budget": None,
        "batch": 1,
        "context_length": context_length,
        "ttft_s": 1.0,
        "tpot_median_s": tpot,
        "tpot_p95_s": 2 * tpot,
        "tokens_per_s": 1 / tpot,
        "nbytes": 1,
        "peak_bytes": 2**30,
        "tpot_over_static": 1.0,
        "tpot_over_dynamic": 1.0,
        "ttft_over_static": 1.0,
    }


def test_lines_are_in_milliseconds_and_reach_p95() -> None:
    rows = [timing("ksvd", 4096, 0.04), timing("ksvd", 1024, 0.01)]
    axes = plots.latency_by_context(rows, plots.Palette(["ksvd"])).axes[1]
    assert axes.lines[0].get_xydata().tolist() == [[1024, pytest.approx(10)], [4096, pytest.approx(40)]]
    assert [segment[1][1] for segment in axes.collections[0].get_segments()] == pytest.approx([20, 80])
    assert axes.get_ylim()[1] >= 80


def test_what_was_not_measured_has_no_panel() -> None:
    rows = [timing("ksvd", length, 0.01) | {"peak_bytes": None, "ttft_s": None} for length in (1024, 4096)]
    figure = plots.latency_by_context(rows, plots.Palette(["ksvd"]))
    assert len(figure.axes) == 2


def test_one_length_makes_bars() -> None:
    figure = plots.latency_by_context([timing("full", 1024, 0.01), timing("ksvd", 1024, 0.02)], plots.Palette(["ksvd"]))
    axes = figure.axes[1]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([10, 20])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["full", "ksvd"]
