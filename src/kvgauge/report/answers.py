"""Which cell to take at which budget: the best one, what it costs, and what these samples leave open.

A cell competes at every budget that its measured bytes keep to, whatever budget it was asked for: a cell of a quarter
is an answer for a half, and one that frees no memory is none. The best is chosen by its score on these very samples,
so the score flatters it; that is why every cell stands beside it whose paired difference from it may be zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import pandas as pd

from kvgauge.evaluation import dominance
from kvgauge.report.settings import Setting, settings
from kvgauge.report.tables import timed_cells

Row = dict[str, Any]

COSTS = {"timed_at": "context_length", "batch": "batch", "ttft": "ttft_over_static", "tpot": "tpot_over_static"}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The best cell of a budget.

    Attributes:
        model, compress_at: of the setting.
        budget: cached bytes / uncompressed bytes that a cell may take, None where none is set.
        cell: the best one; None where no cell is small enough, or none of those scores above 0.
        competitors: how many cells are small enough.
        samples: prompts that all cells of the setting have met; the best is chosen on these.
        score, score_low, score_high: mean of task means with its 95% interval, on all the cell's samples.
        diff, diff_low, diff_high: the paired difference from the uncompressed cache.
        detectable: the smallest difference that these samples would show four times in five.
        bytes_ratio: cached bytes / uncompressed bytes, as measured.
        nbytes, full_nbytes: means per prompt, cached and uncompressed.
        fixed_nbytes: bases and the like, held once for all prompts.
        timed_at, batch: the longest context in tokens and the smallest batch that the cell was timed at.
        ttft, tpot: times to the first token and per token, over those of the preallocated uncompressed cache.
        open: cells of the same budget whose paired difference from the best has an interval that holds zero, the
            highest score first.
        beaten: how many cells of the same budget are shown to be worse.
    """

    model: str
    compress_at: str
    budget: float | None
    cell: str | None = None
    competitors: int = 0
    samples: int = 0
    score: float | None = None
    score_low: float | None = None
    score_high: float | None = None
    diff: float | None = None
    diff_low: float | None = None
    diff_high: float | None = None
    detectable: float | None = None
    bytes_ratio: float | None = None
    nbytes: float | None = None
    full_nbytes: float | None = None
    fixed_nbytes: int | None = None
    timed_at: int | None = None
    batch: int | None = None
    ttft: float | None = None
    tpot: float | None = None
    open: tuple[str, ...] = ()
    beaten: int = 0


def answers(
    samples: Sequence[Row], cells: Sequence[Row], latency: Sequence[Row] = (), baseline: str = "full"
) -> list[Answer]:
    """The best cell of every budget, largest budget first, for every model and moment of compression.

    Args:
        samples: rows of the evaluate stage.
        cells: their summary, of `kvgauge.evaluation.statistics.summarise`.
        latency: rows of the latency stage.
        baseline: label of the uncompressed cell; it does not compete.
    """
    costs = _costs(latency)
    paired = {
        (model, compress_at): dominance.Comparison(rows)
        for model, compress_at, rows in dominance.settings(samples, baseline)
    }
    found: list[Answer] = []
    for each in settings(cells, baseline):
        scores = paired.get((each.model, each.compress_at))
        if scores is not None and scores.samples:
            budgets = {row["budget"] for row in each.overall if row["budget"] is not None}
            found += [_answer(each, scores, budget, costs, baseline) for budget in _descending(budgets)]
    return found


def answer_table(found: Iterable[Answer]) -> pd.DataFrame:
    """One row per answer, numbers unrounded; the open cells joined with commas."""
    rows = [asdict(answer) | {"open": ", ".join(answer.open)} for answer in found]
    return pd.DataFrame.from_records(rows, columns=[field.name for field in fields(Answer)])


def _descending(budgets: Iterable[float]) -> list[float | None]:
    """The budgets, the largest first; one of no size where there are none."""
    return [*sorted(budgets, reverse=True)] or [None]


def _answer(
    each: Setting,
    scores: dominance.Comparison,
    budget: float | None,
    costs: Mapping[tuple[str, str], Row],
    baseline: str,
) -> Answer:
    means, ratios = scores.means(), scores.ratios
    rivals = [
        cell
        for cell in scores.cells
        if cell != baseline and (budget is None or ratios[cell] <= dominance.SIZE_TOLERANCE * budget)
    ]
    # Of equal scores the smaller cell's is the better.
    rivals.sort(key=lambda cell: (-means[cell], ratios[cell], cell))
    head: Row = {"model": each.model, "compress_at": each.compress_at, "budget": budget}
    head |= {"competitors": len(rivals), "samples": scores.samples}
    if not rivals or means[rivals[0]] <= 0.0:
        return Answer(**head)
    best = rivals[0]
    [row] = [row for row in each.overall if row["cell"] == best and row["task"] == "all"]
    differences = scores.differences([(best, other) for other in rivals[1:]])
    unsettled = tuple(found["other"] for found in differences if found["diff_low"] <= 0.0 <= found["diff_high"])
    return Answer(
        **head,
        cell=best,
        score=row["mean"],
        score_low=row["low"],
        score_high=row["high"],
        **{name: row[name] for name in ("diff", "diff_low", "diff_high", "detectable")},
        **{name: row[name] for name in ("bytes_ratio", "nbytes", "full_nbytes", "fixed_nbytes")},
        **costs.get((each.model, best), costs.get(("", best), {})),
        open=unsettled,
        beaten=len(differences) - len(unsettled),
    )


def _costs(latency: Sequence[Row]) -> dict[tuple[str, str], Row]:
    """What was timed, by model and cell; the model is empty where the rows do not name it."""
    if not latency:
        return {}
    return {
        (str(row.get("model", "")), str(row["cell"])): {
            name: None if pd.isna(row[column]) else row[column] for name, column in COSTS.items()
        }
        for row in timed_cells(latency).to_dict("records")
    }
