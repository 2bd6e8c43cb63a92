"""The averages that papers print: of the six categories, and over them.

LongBench (arXiv 2308.14508, and its leaderboard) gives English and Chinese apart, the two code datasets in both, each
category as the mean of its datasets and the overall figure as the mean of the categories. (Papers on caches often
print the plain mean over datasets instead: that is the row "all" of the cells.) LongBench-E's figures are taken in each
length interval.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from kvgauge.benchmarks.longbench.buckets import BUCKETS
from kvgauge.benchmarks.longbench.datasets import (
    CATEGORIES,
    DATASETS,
    E_SUFFIX,
    EDITIONS,
    Dataset,
    Edition,
    dataset_of,
    names,
    task_name,
)
from kvgauge.contract.benchmark import means_by_setting

_SPOKEN = ("en", "zh")


def averages(cells: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Category and overall averages from rows of cells.

    Args:
        cells: rows with ``cell``, ``method``, ``budget``, ``compress_at``, ``model``, ``task``, ``length`` and
            ``mean``, as `kvgauge.evaluation.statistics.summarise` makes them; those of the task "all" are passed over.

    Returns:
        For each cell, length and language a row per category that has datasets there, and one for ``overall``: the
        cell's own keys, ``language`` (``en``, ``zh``; ``all`` where there are both, or only code), ``average``,
        ``mean`` (0 to 1), ``tasks``, and ``complete`` (whether every dataset that belongs to the average is in it); in
        LongBench-E also ``words``, the length interval, or ``all`` for the mean over them.

    Raises:
        UserError: a task that is not LongBench's.
    """
    return [
        setting | _words(setting["length"], means) | row
        for setting, means in means_by_setting(cells)
        for language in _languages(means)
        for row in _rows(means, language)
    ]


def _words(length: int | None, tasks: Iterable[str]) -> dict[str, str]:
    """The length interval of LongBench-E's tasks; nothing in the other editions."""
    if not all(task.endswith(E_SUFFIX) for task in tasks):
        return {}
    return {"words": next((bucket.label for bucket in BUCKETS if bucket.length == length), "all")}


def _languages(means: Mapping[str, float]) -> list[str]:
    there = [language for language in _SPOKEN if any(dataset_of(task).language == language for task in means)]
    return there if len(there) == 1 else [*there, "all"]


def _rows(means: Mapping[str, float], language: str) -> list[dict[str, Any]]:
    belongs = [DATASETS[name] for name in names(_edition(means)) if _counts(DATASETS[name], language)]
    rows = []
    for category in CATEGORIES:
        expected = {dataset.name for dataset in belongs if dataset.category == category}
        tasks = sorted(task for task in means if dataset_of(task).name in expected)
        if tasks:
            rows.append(_row(language, category, fmean(means[task] for task in tasks), tasks, len(expected)))
    tasks = sorted(task for row in rows for task in row["tasks"])
    return [*rows, _row(language, "overall", fmean(row["mean"] for row in rows), tasks, len(belongs))]


def _edition(tasks: Iterable[str]) -> Edition:
    """The edition that all the tasks are of; the standard one where they are of several."""
    own = (edition for edition in EDITIONS if set(tasks) <= {task_name(name, edition) for name in names(edition)})
    return next(own, "standard")


def _counts(dataset: Dataset, language: str) -> bool:
    return language == "all" or dataset.language in (language, "code")


def _row(language: str, average: str, mean: float, tasks: list[str], expected: int) -> dict[str, Any]:
    return {"language": language, "average": average, "mean": mean, "tasks": tasks, "complete": len(tasks) == expected}
