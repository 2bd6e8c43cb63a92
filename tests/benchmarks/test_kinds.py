"""Every task of every benchmark has a type."""

from __future__ import annotations

import pytest
from kvgauge.benchmarks.task_types import OTHER, TASK_TYPES, task_type

from kvgauge.benchmarks.longbench.datasets import EDITIONS, names, task_name
from kvgauge.benchmarks.ruler.tasks import TASKS


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("niah_multikey_3", "retrieval"),
        ("vt", "aggregation"),
        ("cwe", "aggregation"),
        ("fwe", "aggregation"),
        ("qa_1", "qa"),
        ("qasper_e", "qa"),
        ("hotpotqa_stand_in", "qa"),
        ("triviaqa", "few-shot"),
        ("trec_stand_in", "few-shot"),
        ("passage_count", "aggregation"),
        ("passage_retrieval_en", "retrieval"),
        ("gov_report", "summarization"),
        ("lcc", "code"),
        ("somebody_elses", OTHER),
    ],
)
def test_types(task: str, kind: str) -> None:
    assert task_type(task) == kind


def test_no_task_of_the_benchmarks_is_of_another_type() -> None:
    tasks = [*TASKS, *(task_name(name, edition) for edition in EDITIONS for name in names(edition))]
    assert {task_type(task) for task in tasks} <= set(TASK_TYPES) - {OTHER}
