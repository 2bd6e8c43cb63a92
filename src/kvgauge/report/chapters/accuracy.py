"""The chapter on scores and bytes."""

from __future__ import annotations

import pandas as pd

from kvgauge.report import plots, tables
from kvgauge.report.chapters.draft import Draft, table_block
from kvgauge.report.collect import Measurements
from kvgauge.report.page.blocks import Block
from kvgauge.report.settings import Setting, settings

READING = (
    "Scores run from 0 to 1. Brackets are 95% intervals: the percentile bootstrap, resampled within tasks; where "
    "a task's scores are all equal, the exact binomial bound. diff is the difference from the uncompressed cache on "
    "the same samples, p the exact two-sided sign test over the samples whose score changed, not corrected for the "
    "number of cells. A true difference below the smallest detectable one would be missed more often than once in "
    "five."
)
PARETO = (
    "Up and left is better. Bars are 95% intervals; the star and the band are the uncompressed cache; the grey steps "
    "join the cells than which none as small (within 4%) is better. Methods at one budget are set a few points apart."
)


def accuracy(draft: Draft, measured: Measurements, main: pd.DataFrame, palette: plots.Palette) -> None:
    """Score against bytes, the main table, differences, lengths and parts.

    Args:
        draft: receives the chapter.
        measured: what the stages measured.
        main: of `kvgauge.report.tables.main_table`.
        palette: the report's styles.
    """
    blocks = [
        block
        for each in settings(measured.cells, palette.baseline)
        for block in _figures(draft, measured, each, palette)
    ]
    blocks.insert(1, table_block(main, "Table", READING))
    draft.chapter("Accuracy and bytes", blocks)


def _figures(draft: Draft, measured: Measurements, each: Setting, palette: plots.Palette) -> list[Block]:
    mark, cells, overall = each.mark, each.cells, each.overall
    samples = each.samples(measured.samples)
    title = f"Accuracy against cached bytes{mark}"
    blocks = [draft.figure(f"pareto{mark}", plots.pareto(overall, palette), title, PARETO)]
    if len(tables.task_names(overall)) > 1:
        figure = plots.pareto_by_task(overall, palette)
        blocks.append(draft.figure(f"pareto-by-task{mark}", figure, f"By task{mark}", "The same, task by task."))
    if any(cell["diff"] is not None for cell in overall):
        blocks.append(
            draft.figure(
                f"differences{mark}",
                plots.differences(overall, palette),
                f"Difference from the uncompressed cache{mark}",
                "Paired by sample, with 95% intervals. A hollow mark: the interval holds zero.",
            )
        )
    if any(cell["length"] is None for cell in cells):
        blocks.append(
            draft.figure(
                f"accuracy-by-length{mark}",
                plots.accuracy_by_length(cells, palette),
                f"By context length{mark}",
                "One panel per budget, with 95% intervals.",
            )
        )
    if any(row["method"] != palette.baseline for row in samples):
        figure = plots.bytes_by_part(samples, palette)
        title = f"What the bytes are{mark}"
        blocks.append(draft.figure(f"bytes-by-part{mark}", figure, title, "Means over all samples."))
    return blocks
