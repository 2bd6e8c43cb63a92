"""The averages that a benchmark's papers print beside the means of tasks, as its evaluations wrote them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from kvgauge.contract.benchmark import AVERAGE_KEYS

Row = Mapping[str, Any]

HEAD = ["cell", "method", "budget", "compress_at", "model"]
_SAID = {*AVERAGE_KEYS, "benchmark", "complete", "tasks", "n"}  # any other key tells rows of one cell apart


def averages_tables(directories: Iterable[Sequence[Row]]) -> dict[str, pd.DataFrame]:
    """A table for every benchmark that has averages, by its name.

    One row per cell and whatever tells its averages apart, a column per average: percent, as text. A star stands behind
    an average that lacks some of its tasks. The length stands there where rows would look alike without it, and so does
    the number of samples, as of two evaluations of one cell.

    Args:
        directories: the rows of each directory, with the number of their samples (``n``), see
            `kvgauge.report.collect.Measurements`. Evaluations are not mixed: each has rows of its own.
    """
    by_benchmark: dict[str, list[list[Row]]] = {}
    for rows in directories:
        for name in dict.fromkeys(str(row.get("benchmark", "")) for row in rows):
            own = [row for row in rows if str(row.get("benchmark", "")) == name]
            by_benchmark.setdefault(name, []).append(own)
    return {name: _table(own) for name, own in by_benchmark.items()}


def _table(directories: Sequence[Sequence[Row]]) -> pd.DataFrame:
    lines: list[dict[str, Any]] = []
    names: list[str] = []
    said = [item for rows in directories for row in rows for item in row.items()]
    apart = list(dict.fromkeys(key for key, value in said if key not in _SAID and not isinstance(value, (list, dict))))
    for rows in directories:
        found: dict[tuple[Any, ...], dict[str, Any]] = {}
        for row in rows:
            head = {key: row.get(key) for key in (*HEAD, *apart, "length")}
            line = found.setdefault(tuple(head.values()), head | {"n": 0})
            line["n"] = max(line["n"], row["n"])
            line[row["average"]] = f"{100 * row['mean']:.2f}{'' if row.get('complete', True) else '*'}"
        for line in found.values():
            _merge(names, [name for name in line if name not in (*HEAD, *apart, "length", "n")])
        lines += found.values()
    table = pd.DataFrame.from_records(lines, columns=[*HEAD, *apart, "length", "n", *names]).drop_duplicates()
    for name in ("n", "length"):
        if not table.drop(columns=[name, *names]).duplicated().any():
            table = table.drop(columns=name)
    empty = [name for name in apart if table[name].isna().all()]
    return table.drop(columns=empty).reset_index(drop=True)


def _merge(names: list[str], more: Sequence[str]) -> None:
    """Bring `more` into `names`, each new one before the next that is there already: an overall figure stays last."""
    place = len(names)
    for name in reversed(more):
        if name in names:
            place = names.index(name)
        else:
            names.insert(place, name)
