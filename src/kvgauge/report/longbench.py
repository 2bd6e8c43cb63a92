"""LongBench's own averages: categories and overall, in LongBench-E for each length interval."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from kvgauge.benchmarks.longbench import BUCKETS, averages
from kvgauge.benchmarks.longbench.datasets import CATEGORIES, E_SUFFIX, EDITIONS, names, task_name

SETTING = ["cell", "method", "budget", "compress_at", "model"]


def longbench_table(cells: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per cell, language and length interval; categories and overall in percent, as text.

    A star stands behind an average that lacks some of its datasets.

    Args:
        cells: rows as `kvgauge.evaluation.statistics.summarise` makes them; those of other benchmarks are passed over.
    """
    known = {task_name(name, edition) for edition in EDITIONS for name in names(edition)}
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in averages(cell for cell in cells if cell["task"] in known):
        key = (*(row[name] for name in SETTING), row["language"], row["length"])
        line = found.setdefault(
            key, {name: row[name] for name in SETTING} | {"language": row["language"], "words": _words(row)}
        )
        line[row["average"]] = f"{100 * row['mean']:.2f}{'' if row['complete'] else '*'}"
    columns = [*SETTING, "language", "words", *CATEGORIES, "overall"]
    table = pd.DataFrame.from_records(list(found.values()), columns=columns)
    return table.drop(columns=[name for name in (*CATEGORIES, "words") if table[name].isna().all()])


def _words(row: Mapping[str, Any]) -> str | None:
    """The length interval of a row of LongBench-E, "all" for the mean over them; None in the other editions."""
    if not all(task.endswith(E_SUFFIX) for task in row["tasks"]):
        return None
    return next((bucket.label for bucket in BUCKETS if bucket.length == row["length"]), "all")
