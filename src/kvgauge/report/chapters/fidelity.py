"""The chapter on errors by layer and on the model's predictions."""

from __future__ import annotations

from typing import Any

import pandas as pd

from kvgauge.report import plots
from kvgauge.report.chapters.draft import Draft, table_block
from kvgauge.report.collect import Measurements
from kvgauge.report.page.blocks import Block
from kvgauge.report.settings import mark

Row = dict[str, Any]

BY_RANK = (
    "Mean over layers; bands are the range over sequences. Rank of the values for V and VO, of the keys otherwise."
)


def fidelity(draft: Draft, measured: Measurements, table: pd.DataFrame, palette: plots.Palette) -> None:
    """Predictions against bytes, errors by layer and by rank, and their table.

    Args:
        draft: receives the chapter.
        measured: what the stages measured.
        table: of `kvgauge.report.tables.fidelity_table`.
        palette: the report's styles.
    """
    blocks: list[Block] = []
    models = sorted({str(row.get("model", "")) for row in [*measured.fidelity, *measured.model]})
    for model in models:
        errors = [row for row in measured.fidelity if str(row.get("model", "")) == model]
        predictions = [row for row in measured.model if str(row.get("model", "")) == model]
        blocks += _figures(draft, errors, predictions, mark(len(models) > 1, model), palette)
    blocks.append(table_block(table, "Table", "Means over layers and sequences; KL in nats per token."))
    draft.chapter("Fidelity", blocks)


def _figures(draft: Draft, errors: list[Row], predictions: list[Row], name: str, palette: plots.Palette) -> list[Block]:
    blocks: list[Block] = []
    known = [row for row in predictions if row["method"] != palette.baseline and row["kl"] is not None]
    if known:
        blocks.append(
            draft.figure(
                f"divergence{name}",
                plots.divergence(known, palette),
                f"Predictions against cached bytes{name}",
                "Down and left is better. Lines join means over sequences, dots are the sequences.",
            )
        )
    if errors:
        blocks.append(
            draft.figure(
                f"error-by-layer{name}",
                plots.error_by_layer(errors, palette),
                f"Error by layer{name}",
                "Relative Frobenius error, mean over sequences.",
            )
        )
    by_rank = plots.error_by_rank(errors, palette) if errors else None
    if by_rank is not None:
        blocks.append(draft.figure(f"error-by-rank{name}", by_rank, f"Error by rank{name}", BY_RANK))
    return blocks
