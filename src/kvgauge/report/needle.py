"""Where in a context a fact is found again: scores by depth and length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

Row = dict[str, Any]

COLUMNS = ["model", "compress_at", "cell", "method", "budget", "length", "depth", "n", "score"]
MANY = 21  # rows of a heat map; depths of more values than this are gathered
TENTHS = 10


def needle_table(samples: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """The mean score of every cell at every depth and length.

    Args:
        samples: rows of the evaluate stage; those with a ``depth`` count, 0 at the beginning of the context and 1 at
            its end.

    Returns:
        One row per model, moment of compression, cell, length and depth, with the number of samples ``n``. Depths of
        more than `MANY` values are gathered to the nearest tenth. Empty where no sample has a depth.
    """
    rows = [
        {name: row.get(name) for name in (*COLUMNS[:7], "score")} for row in samples if row.get("depth") is not None
    ]
    if not rows:
        return pd.DataFrame(columns=COLUMNS)
    frame = pd.DataFrame.from_records(rows)
    frame["budget"] = pd.to_numeric(frame["budget"])
    frame["depth"] = frame["depth"].astype(float)
    if frame["depth"].nunique() > MANY:
        frame["depth"] = (frame["depth"] * TENTHS).round() / TENTHS
    means = frame.groupby(COLUMNS[:7], dropna=False)["score"].agg(n="size", score="mean").reset_index()
    # The uncompressed cache, which has no budget, first; then the largest budget first.
    means["smaller"] = -means["budget"].fillna(float("inf"))
    order = ["model", "compress_at", "smaller", "method", "cell", "length", "depth"]
    return means.sort_values(order, ignore_index=True)[COLUMNS]
