"""Every task of every benchmark is of a kind."""

from __future__ import annotations

import pytest

from kvgauge.benchmarks.longbench import LongBench
from kvgauge.benchmarks.longbench.datasets import EDITIONS, names, task_name
from kvgauge.benchmarks.ruler import Ruler
from kvgauge.benchmarks.ruler.tasks import TASKS
from kvgauge.contract.benchmark import KINDS, OTHER


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("niah_multikey_3", "retrieval"),
        ("vt", "aggregation"),
        ("cwe", "aggregation"),
        ("fwe", "aggregation"),
        ("qa_1", "qa"),
        ("somebody_elses", OTHER),
    ],
)
def test_kinds_of_ruler(task: str, kind: str) -> None:
    assert Ruler().kind(task) == kind


@pytest.mark.parametrize(
    ("task", "kind"),
    [
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
def test_kinds_of_longbench(task: str, kind: str) -> None:
    assert LongBench().kind(task) == kind


def test_no_task_of_the_benchmarks_is_of_another_kind() -> None:
    kinds = {Ruler().kind(task) for task in TASKS}
    kinds |= {LongBench().kind(task_name(name, edition)) for edition in EDITIONS for name in names(edition)}
    assert kinds <= set(KINDS)
