"""The table by task type: what a method keeps of a context when it has not seen the question, beside when it has."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from kvgauge.contract.benchmark import KINDS, OTHER
from kvgauge.evaluation.statistics import summarise
from kvgauge.report.tables import fidelity_label

Row = dict[str, Any]

LANGUAGE_MODELLING = "language modelling"
MOMENTS = ("context", "prompt")
HEAD = ["type", "cell", "model", "tasks", "n"]
PREDICTIONS = ["kl", "perplexity", "perplexity_full"]
COLUMNS = [
    *HEAD,
    *(f"{moment}{end}" for moment in MOMENTS for end in ("", "_low", "_high")),
    *(f"diff_{moment}{end}" for moment in MOMENTS for end in ("", "_low", "_high")),
    *PREDICTIONS,
]


def task_type_table(
    samples: Sequence[Mapping[str, Any]], predictions: Sequence[Mapping[str, Any]] = (), baseline: str = "full"
) -> pd.DataFrame:
    """One row per task type, model and cell: the types of `KINDS` first, then others by name.

    Args:
        samples: rows of the evaluate stage; one that does not say of what ``kind`` it is is of the type "other".
        predictions: rows of ``model.json`` of the merge stage; they are the type "language modelling".
        baseline: label of the uncompressed cell, which has no moment of compression: its means stand at both.

    Returns:
        Numbers, unrounded. ``context`` and ``prompt``: the mean of the means of the type's tasks, compressed before the
        question was read and after it, with 95% intervals; ``diff_…``: the paired differences from the uncompressed
        cache; ``kl`` (nats per token) and perplexities of text that continues a compressed context; ``tasks``: their
        names; ``n``: samples per moment.
    """
    rows: dict[tuple[str, str, str], Row] = {}
    for kind, cell in _summaries(samples, baseline):
        row = rows.setdefault(
            (kind, cell["model"], cell["cell"]), {"type": kind, "cell": cell["cell"], "model": cell["model"]}
        )
        row |= {"tasks": cell["tasks"], "n": cell["n"]}
        for moment in MOMENTS if cell["cell"] == baseline else (cell["compress_at"],):
            row |= {f"{moment}{end}": cell[name] for end, name in (("", "mean"), ("_low", "low"), ("_high", "high"))}
            row |= {f"diff_{moment}{end}": cell[f"diff{end}"] for end in ("", "_low", "_high")}
    lines = [*rows.values(), *_perplexities(predictions, baseline)]
    table = pd.DataFrame.from_records(lines).reindex(columns=COLUMNS)
    own = sorted({row["type"] for row in lines} - {*KINDS, LANGUAGE_MODELLING, OTHER})
    order = table["type"].map([*KINDS, *own, LANGUAGE_MODELLING, OTHER].index)
    return table.assign(order=order).sort_values("order", kind="stable", ignore_index=True).drop(columns="order")


def _summaries(samples: Sequence[Mapping[str, Any]], baseline: str) -> Iterator[tuple[str, Row]]:
    """(type, row over all its tasks and lengths) in the order of `summarise`."""
    by_type: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for sample in samples:
        by_type[str(sample.get("kind") or OTHER)].append(sample)
    for kind, members in by_type.items():
        tasks = ", ".join(sorted({str(sample["task"]) for sample in members}))
        several = len({sample["length"] for sample in members}) > 1
        for row in summarise(members, baseline):
            if row["task"] == "all" and (row["length"] is None or not several):
                yield kind, row | {"tasks": tasks}


def _perplexities(predictions: Sequence[Mapping[str, Any]], baseline: str) -> Iterator[Row]:
    """Means over sequences for each model and cell; the uncompressed model's first, if all cells had the same text."""
    by_model: dict[str, dict[str, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in predictions:
        if row["kl"] is not None:
            by_model[str(row.get("model", ""))][fidelity_label(dict(row))].append(row)
    for model, cells in by_model.items():
        head: Row = {"type": LANGUAGE_MODELLING, "tasks": "held-out text", "model": model}
        means = {
            cell: {"n": len(rows)} | {name: float(np.mean([row[name] for row in rows])) for name in PREDICTIONS}
            for cell, rows in cells.items()
        }
        exact = {(figures["n"], figures["perplexity_full"]) for figures in means.values()}
        if len(exact) == 1 and baseline not in cells:
            [(n, perplexity)] = exact
            figures = {"n": n, "kl": 0.0, "perplexity": perplexity, "perplexity_full": perplexity}
            yield head | {"cell": baseline} | figures
        for cell, figures in means.items():
            yield head | {"cell": cell} | figures
