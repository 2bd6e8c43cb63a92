"""The chapter on where in a context a fact is found again."""

from __future__ import annotations

import pandas as pd

from kvgauge.report import plots
from kvgauge.report.chapters.draft import Draft
from kvgauge.report.page.blocks import Block, HeatMap, HeatMaps
from kvgauge.report.settings import mark

CAPTION = (
    "Mean score by the depth of the fact, 0 at the beginning of the context and 1 at its end, and by the length of the "
    "context in tokens; the uncompressed cache first, then the largest budget first."
)


def needle(draft: Draft, table: pd.DataFrame) -> None:
    """A heat map of depth and length per cell, and the same as one picture.

    Args:
        draft: receives the chapter.
        table: of `kvgauge.report.needle.needle_table`, not empty.
    """
    blocks: list[HeatMaps | Block] = []
    settings = table.groupby(["model", "compress_at"], sort=True, dropna=False)
    for (model, compress_at), rows in settings:
        name = mark(len(settings) > 1, str(model), str(compress_at))
        draft.figure(f"needle{name}", plots.needle(rows), "", "")
        blocks.append(HeatMaps(name.strip(" ()"), CAPTION, _maps(rows), row_name="depth", column_name="tokens"))
    draft.chapter("Needle", blocks)


def _maps(rows: pd.DataFrame) -> list[HeatMap]:
    lengths, depths = sorted(rows["length"].unique()), sorted(rows["depth"].unique())
    maps: list[HeatMap] = []
    for cell, here in rows.groupby("cell", sort=False):
        scores = dict(zip(zip(here["depth"], here["length"], strict=True), here["score"].tolist(), strict=True))
        mean = sum(here["score"] * here["n"]) / here["n"].sum()
        lines = [(f"{depth:.3g}", [scores.get((depth, length)) for length in lengths]) for depth in depths]
        note = f"{mean:.2f} on {int(here['n'].sum()):,} samples"
        maps.append(HeatMap(str(cell), note, [_tokens(int(length)) for length in lengths], lines))
    return maps


def _tokens(length: int) -> str:
    """A length in tokens, short enough to stand over a narrow column."""
    return f"{length // 1024}K" if length >= 1024 and length % 1024 == 0 else f"{length:,}"
