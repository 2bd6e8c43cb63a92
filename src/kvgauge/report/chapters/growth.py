"""The chapter on caches that grow while they answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from kvgauge.report import plots
from kvgauge.report.chapters.draft import Draft, table_block
from kvgauge.report.page.blocks import Block
from kvgauge.report.settings import mark

PICTURE = (
    "Mean cached bytes while answers are written, up to where half of them have ended; black: the uncompressed cache, "
    "dotted: what the cell's budget allows the whole sequence. A name that ends in ~n compresses again at every n-th "
    "token behind the context, and keeps to its budget there; one without compresses the context alone. Uncompressed "
    "bytes are those of this run, in the model's dtype; budgets of quantised cells are shares of a cache in 16 bits."
)
TABLE = (
    "Shares of the uncompressed cache at the end of the same answer; over the budget: the most that a compression "
    "while decoding left of what the budget allows."
)


def growth(draft: Draft, samples: Sequence[dict[str, Any]], table: pd.DataFrame, palette: plots.Palette) -> None:
    """Bytes against tokens written, and their table.

    Args:
        draft: receives the chapter.
        samples: of `kvgauge.report.growth.growing`, not empty.
        table: of `kvgauge.report.growth.growth_table`.
        palette: the report's styles.
    """
    blocks: list[Block] = []
    settings = table.groupby(["model", "compress_at"], sort=True)
    for (model, compress_at), rows in settings:
        name = mark(len(settings) > 1, str(model), str(compress_at))
        here = [row for row in samples if (row["model"], row["compress_at"]) == (model, compress_at)]
        figure = plots.growth(here, list(rows["cell"]), palette)
        blocks.append(draft.figure(f"growth{name}", figure, f"Bytes while answering{name}", PICTURE))
    draft.chapter("While answering", [*blocks, table_block(table, "Table", TABLE)])
