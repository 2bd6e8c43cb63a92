"""What the interactive figures draw is what the rows say; they are drawn here with the library of the page."""

from __future__ import annotations

import re
from typing import Any

import pytest
import vl_convert

from kvgauge.report import interactive, tables
from kvgauge.report.interactive import points
from kvgauge.report.plots import Palette
from kvgauge.report.plots.style import MARKERS

Row = dict[str, Any]


def cell(label: str, mean: float, **changes: Any) -> Row:
    method, _, budget = label.partition("@")
    row = {"cell": label, "method": method, "budget": float(budget) if budget else None, "model": "m", "task": "all"}
    row |= {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "bytes_ratio": row["budget"] or 1.0, "nbytes": 2048.0}
    row |= {"diff": None if label == "full" else mean - 0.8, "diff_low": mean - 0.9, "diff_high": mean - 0.7}
    return row | changes


def timed(label: str, tpot: float, **changes: Any) -> Row:
    row = {"cell": label, "method": label.partition("@")[0], "budget": None, "model": "m", "batch": 1}
    row |= {"context_length": 1024, "ttft_s": 1.0, "tpot_median_s": 0.1, "tpot_p95_s": 0.1, "tokens_per_s": 10.0}
    row |= {"nbytes": 1, "peak_bytes": None, "tpot_over_static": tpot, "tpot_over_dynamic": 9.0}
    return row | {"ttft_over_static": 2.0} | changes


CELLS = [
    cell("xkv@0.5", 0.75),
    cell("xkv@0.25", 0.6),
    cell("ksvd@0.5", 0.5),
    cell("full", 0.8),
    cell("full", 0.9, task="vt"),
]
LATENCY = [timed("full", 1.0), timed("xkv@0.5", 1.5), timed("xkv@0.5", 1.25, context_length=2048)]
PALETTE = Palette(row["method"] for row in CELLS)


def values(spec: Row) -> list[Row]:
    return next(data["values"] for data in spec["data"] if data["name"] == "cells")


def symbols(spec: Row, **signals: Any) -> int:
    """How many marks of cells the library draws."""
    changed = [signal | {"value": signals.get(signal["name"], signal["value"])} for signal in spec["signals"]]
    svg = vl_convert.vega_to_svg(spec | {"signals": changed})
    [group] = re.findall(r'<g class="mark-symbol role-mark cell".*?</g>', svg, re.DOTALL)
    return group.count("<path")


def test_points_are_the_rows() -> None:
    rows = points(CELLS, LATENCY, PALETTE)
    assert [row["cell"] for row in rows] == ["full", "ksvd@0.5", "xkv@0.25", "xkv@0.5"]
    known = {row["cell"]: row for row in CELLS if row["task"] == "all"}
    for row in rows:
        for name in ("method", "budget", "mean", "low", "high", "bytes_ratio"):
            assert row[name] == known[row["cell"]][name]
    times = {row["cell"]: row["tpot"] for row in rows}
    assert times == {"full": 1.0, "ksvd@0.5": None, "xkv@0.25": None, "xkv@0.5": 1.25}  # the longest context's


def test_the_mouse_is_told_the_cell_s_interval_and_its_costs() -> None:
    said = {row["cell"]: dict(row["lines"]) for row in points(CELLS, LATENCY, PALETTE)}
    assert said["xkv@0.5"] == {
        "score": "0.75 [0.65, 0.85]",
        "difference from full": "-0.05 [-0.15, 0.05]",
        "bytes / full": "0.500",
        "bytes per prompt": tables.format_bytes(2048),
        "TPOT / full": "1.25",
        "TTFT / full": "2.00",
        "timed at": "2,048 tokens, batch 1",
    }
    assert set(said["ksvd@0.5"]) == {"score", "difference from full", "bytes / full", "bytes per prompt"}
    assert "difference from full" not in said["full"]


def test_the_figures_hold_the_points() -> None:
    rows = points(CELLS, LATENCY, PALETTE)
    by_bytes, by_time = interactive.score_against_bytes(rows, PALETTE), interactive.score_against_time(rows, PALETTE)
    assert by_time is not None
    kept = [{name: row[name] for name in rows[0]} for row in values(by_bytes)]
    assert kept == rows
    assert [row["cell"] for row in values(by_time)] == ["full", "xkv@0.5"]
    assert {row["cell"] for row in values(by_bytes) if row["name"]} == {"full", "xkv@0.5", "xkv@0.25"}
    steps = next(data["values"] for data in by_bytes["data"] if data["name"] == "steps")
    assert steps == [{"x": 0.25, "y": 0.6}, {"x": 0.5, "y": 0.75}, {"x": 1.0, "y": 0.8}]


def test_the_library_draws_every_cell_and_leaves_out_what_is_hidden() -> None:
    spec = interactive.score_against_bytes(points(CELLS, LATENCY, PALETTE), PALETTE)
    assert symbols(spec) == 4
    assert symbols(spec, hidden=["xkv"]) == 2
    assert symbols(spec, hidden=["xkv", "ksvd", "full"]) == 0


def test_zooming_changes_the_scale() -> None:
    spec = interactive.score_against_bytes(points(CELLS, LATENCY, PALETTE), PALETTE)
    zoomed = [signal | ({"value": [0.4, 0.6]} if signal["name"] == "y_domain" else {}) for signal in spec["signals"]]
    labels = re.findall(r">(0\.\d+)</text>", vl_convert.vega_to_svg(spec | {"signals": zoomed}))
    assert "0.42" in labels and "0.1" not in labels
    assert "0.1" in re.findall(r">(0\.\d+)</text>", vl_convert.vega_to_svg(spec))


@pytest.mark.parametrize("latency", [[], [timed("full", 1.0)], [timed("dynamic", 1.1)]])
def test_no_times_no_figure_of_times(latency: list[Row]) -> None:
    assert interactive.score_against_time(points(CELLS, latency, PALETTE), PALETTE) is None


def test_times_of_another_model_are_not_this_one_s() -> None:
    rows = points(CELLS, [timed("xkv@0.5", 1.5, model="other")], PALETTE)
    assert [row["tpot"] for row in rows] == [None] * 4


def test_methods_lie_apart_where_they_hold_the_same_bytes() -> None:
    rows = values(interactive.score_against_bytes(points(CELLS, [], PALETTE), PALETTE))
    shifts = {row["method"]: row["shift"] for row in rows}
    assert shifts["full"] == 0.0
    assert shifts["ksvd"] < 0.0 < shifts["xkv"]


def test_the_legend_has_every_method_the_best_first() -> None:
    entries = interactive.legend(points(CELLS, [], PALETTE), PALETTE)
    assert [entry["method"] for entry in entries] == ["full", "xkv", "ksvd"]
    assert entries[0]["colour"] == "var(--ink)"
    assert entries[1]["colour"] == PALETTE["xkv"].colour


def test_every_mark_has_a_shape_that_the_library_knows() -> None:
    methods = [f"m{number}" for number in range(len(MARKERS))]
    palette = Palette([*methods, "full"])
    cells = [cell(f"{method}@0.5", 0.5) for method in methods]
    rows = points([*cells, cell("full", 0.8)], [], palette)
    assert len({row["shape"] for row in rows}) == len(MARKERS) + 1
    assert symbols(interactive.score_against_bytes(rows, palette)) == len(rows)


def test_the_script_is_kept_and_can_stand_in_a_page(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVGAUGE_CACHE", str(tmp_path))
    interactive.vega_script.cache_clear()
    script = interactive.vega_script()
    assert "window.vegaEmbed" in script
    assert "</script" not in script and "<!--" not in script
    [kept] = tmp_path.rglob("*.js")
    assert kept.read_text(encoding="utf-8") == script
    kept.write_text("from the cache", encoding="utf-8")
    interactive.vega_script.cache_clear()
    assert interactive.vega_script() == "from the cache"
    interactive.vega_script.cache_clear()


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVGAUGE_CACHE", str(tmp_path / "file"))
    interactive.vega_script.cache_clear()
    assert "window.vegaEmbed" in interactive.vega_script()
    interactive.vega_script.cache_clear()
