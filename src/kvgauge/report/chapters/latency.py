"""The chapter on time and memory."""

from __future__ import annotations

import pandas as pd

from kvgauge.report import plots
from kvgauge.report.chapters.draft import Draft, table_block
from kvgauge.report.collect import Measurements
from kvgauge.report.page.blocks import Block
from kvgauge.report.settings import mark

TIMES = (
    "Time to first token includes compression; of time per output token the median is drawn, and how far its 95th "
    "percentile reaches."
)
TABLE = (
    "Uncompressed caches: dynamic is transformers' own, static (full) is preallocated, and one-pass is preallocated "
    "and decodes with the compiled kernel that compressed caches decode with."
)


def latency(draft: Draft, measured: Measurements, table: pd.DataFrame, palette: plots.Palette) -> None:
    """Times and memory by context, and their table.

    Args:
        draft: receives the chapter.
        measured: what the stages measured.
        table: of `kvgauge.report.tables.latency_table`.
        palette: the report's styles.
    """
    blocks: list[Block] = []
    settings = sorted({(str(row.get("model", "")), int(row["batch"])) for row in measured.latency})
    for model, batch in settings:
        name = mark(len(settings) > 1, model, f"batch {batch}")
        rows = [row for row in measured.latency if (str(row.get("model", "")), int(row["batch"])) == (model, batch)]
        figure = plots.latency_by_context(rows, palette)
        blocks.append(draft.figure(f"latency{name}", figure, f"Time and memory{name}", TIMES))
    blocks.append(table_block(table, "Table", TABLE))
    draft.chapter("Latency and memory", blocks)
