"""How caches grow while they answer: bytes at the beginning, the peak and the end of answers, and in between."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

Row = dict[str, Any]

LONG = 256  # tokens: shorter answers hardly change what a cache takes
PLACES = 201  # of a curve

SETTING = ["model", "compress_at", "cell", "method", "budget"]
COLUMNS = [
    *SETTING,
    *("n", "written", "start_bytes_ratio", "peak_bytes_ratio", "end_bytes_ratio", "overrun"),
]


def growing(samples: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The samples that say how their cache grew, where there is something to say: long answers, or caches that compress
    while they decode. None of the others."""
    known = [dict(row) for row in samples if row.get("nbytes_written")]
    told = any(row.get("budget_overrun") is not None or row["nbytes_written"][-1][0] >= LONG for row in known)
    return known if told else []


def growth_table(samples: Sequence[Row]) -> pd.DataFrame:
    """Bytes of every cell while it answers, as shares of the uncompressed cache at the end of the same answer.

    Args:
        samples: of `growing`.

    Returns:
        One row per model, moment of compression and cell: answers ``n``, mean tokens ``written``, mean shares at the
        beginning, the peak and the end of an answer, and ``overrun``: the most that a compression while decoding left
        of what the budget allows the whole sequence, empty where there was none.
    """
    if not samples:
        return pd.DataFrame(columns=COLUMNS)
    frame = pd.DataFrame.from_records(samples)
    frame["budget"] = pd.to_numeric(frame["budget"])
    frame["written"] = [points[-1][0] for points in frame["nbytes_written"]]
    frame["overrun"] = pd.to_numeric(frame["budget_overrun"])
    starts = pd.Series([points[0][1] for points in frame["nbytes_written"]], index=frame.index)
    for name, size in (("start", starts), ("peak", frame["nbytes_peak"]), ("end", frame["nbytes_end"])):
        frame[f"{name}_bytes_ratio"] = size / frame["full_nbytes_end"]
    grouped = frame.groupby(SETTING, dropna=False)
    table = grouped[["written", "start_bytes_ratio", "peak_bytes_ratio", "end_bytes_ratio"]].mean()
    table.insert(0, "n", grouped.size())
    table["overrun"] = grouped["overrun"].max()
    table = table.reset_index()
    table["smaller"] = -table["budget"].fillna(np.inf)
    return table.sort_values(["model", "compress_at", "smaller", "method", "cell"], ignore_index=True)[COLUMNS]


def curve(samples: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens written and the mean bytes of a cell then, up to where half of its answers have ended.

    Args:
        samples: of one cell; answers that have ended have no part in the mean.
    """
    ends = np.array([row["nbytes_written"][-1][0] for row in samples])
    places = np.unique(np.linspace(0, int(np.median(ends)), PLACES).round().astype(int))
    found = np.full((len(samples), len(places)), np.nan)
    for row, line in zip(samples, found, strict=True):
        tokens, sizes = (np.array(part) for part in zip(*row["nbytes_written"], strict=True))
        here = places <= tokens[-1]
        line[here] = sizes[np.searchsorted(tokens, places[here], side="right") - 1]
    return places, np.nanmean(found, axis=0)
