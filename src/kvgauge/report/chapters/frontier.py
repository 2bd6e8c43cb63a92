"""The chapter on which cells dominate which."""

from __future__ import annotations

from kvgauge.report import plots
from kvgauge.report.chapters.draft import Draft, table_block
from kvgauge.report.collect import Measurements
from kvgauge.report.frontier import FrontierTables
from kvgauge.report.settings import settings

FRONTIER = (
    "Every cell with its 95% interval; the line joins the cells that no cell of at most the same bytes beats on these "
    "samples. Whether it would on others is what the tables below say."
)
DOMINANCE = (
    "A cell dominates another that takes at least its bytes if its score is better on the same samples: the 95% "
    "interval of the paired difference (bootstrap within tasks) lies above zero. Not corrected for the number of "
    "pairs; all of them are in dominance.csv."
)
BEST = (
    "For each budget the best method as published and the best combination or variant of this project, both chosen by "
    "their score on these samples, and the paired difference (combination minus published) with its 95% interval."
)


def frontier(draft: Draft, measured: Measurements, front: FrontierTables, palette: plots.Palette) -> None:
    """The frontier and its tables.

    Args:
        draft: receives the chapter.
        measured: what the stages measured.
        front: of `kvgauge.report.frontier.frontier_tables`.
        palette: the report's styles.
    """
    blocks = [
        draft.figure(
            f"frontier{each.mark}", plots.frontier(each.overall, palette), f"The frontier{each.mark}", FRONTIER
        )
        for each in settings(measured.cells, palette.baseline)
    ]
    if not front.best.empty:
        blocks.append(table_block(front.best, "The best of each budget", BEST))
    blocks.append(table_block(front.points, "Which cells dominate which", DOMINANCE))
    draft.chapter("Frontier", blocks)
