"""The chapter of interactive figures: what a score costs in bytes and in time."""

from __future__ import annotations

from kvgauge.report import interactive, plots
from kvgauge.report.chapters.draft import Draft
from kvgauge.report.collect import Measurements
from kvgauge.report.page.blocks import Scatter, slug
from kvgauge.report.settings import Setting, settings

CAPTION = (
    "Up and left is better. Bars are 95% intervals; the star, the dotted line and the band are the uncompressed cache; "
    "lines join a method's budgets, and the grey steps the cells than which none as cheap (within 4%) is better. Point "
    "at a mark for its cell, click on a method to hide it, draw a rectangle to zoom into it; a double click shows "
    "everything again."
)
TIMES = " Time per token is the median, over that of the preallocated uncompressed cache of the same length and batch."


def costs(draft: Draft, measured: Measurements, palette: plots.Palette) -> None:
    """Score against bytes and, where cells were timed, against time per token.

    Args:
        draft: receives the chapter.
        measured: what the stages measured.
        palette: the report's styles.
    """
    found = settings(measured.cells, palette.baseline)
    draft.chapter("Score against cost", [_scatter(measured, each, palette) for each in found])


def _scatter(measured: Measurements, each: Setting, palette: plots.Palette) -> Scatter:
    rows = interactive.points(each.overall, measured.latency, palette)
    figures = [("Score against bytes", interactive.score_against_bytes(rows, palette))]
    timed = interactive.score_against_time(rows, palette)
    if timed is not None:
        figures.append(("Score against time per token", timed))
    picture = f"{slug(f'pareto{each.mark}')}.png"
    return Scatter(
        title=each.mark.strip(" ()"),
        caption=CAPTION + (TIMES if timed is not None else ""),
        figures=figures,
        legend=interactive.legend(rows, palette),
        instead=f"This figure is drawn by a script; {picture} beside the page shows score against bytes without one.",
    )
