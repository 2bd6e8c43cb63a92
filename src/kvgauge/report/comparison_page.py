"""A comparison as one HTML page that opens from disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from kvgauge.report import plots
from kvgauge.report.comparison import Row, SideBySide
from kvgauge.report.comparison_tables import Chapter, by_task, chapters
from kvgauge.report.page import Block, Section, render

AXIS = "mean score of B minus mean score of A, same samples"
FIGURE = "Paired by sample, with 95% intervals. A hollow mark: the interval holds zero."


def comparison_page(found: SideBySide, a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """The page as HTML.

    Args:
        found: the comparison.
        a: facts about the first side: ``where`` it is, and what else is worth knowing.
        b: likewise about the second.
    """
    sections = []
    for part in chapters(found):
        blocks = [_block(part)]
        if part.title == "In both":
            figure = plots.to_png(_differences(found.compared))
            blocks = [Block("Difference, B minus A", FIGURE, png=figure), *blocks, _block(by_task(found), "By task")]
        sections.append(Section(part.title, part.text, blocks))
    where = f"A: {a['where']} · B: {b['where']}"
    return render("Two sets of results, side by side", where, sections, {"A": dict(a), "B": dict(b)})


def _block(part: Chapter, title: str = "") -> Block:
    return Block(title, part.note, table=part.shown(), keys=part.keys())


def _differences(rows: Sequence[Row]) -> Figure:
    several = len({(row["model"], row["compress_at"]) for row in rows}) > 1
    named = [row | {"task": "all", "cell": _name(row) if several else row["cell"]} for row in rows]
    return plots.differences(named, plots.Palette(row["method"] for row in rows), AXIS)


def _name(row: Row) -> str:
    return f"{row['cell']}, {row['model']}, {row['compress_at']}"
