"""What kind of task a task is, across benchmarks: what is kept of a context differs more by kind than by benchmark."""

from __future__ import annotations

from kvgauge.benchmarks.longbench.datasets import DATASETS, Category, dataset_of
from kvgauge.benchmarks.ruler.spec import Category as RulerCategory
from kvgauge.benchmarks.ruler.tasks import TASKS
from kvgauge.errors import UserError

LANGUAGE_MODELLING = "language modelling"
OTHER = "other"
# In the order of tables: from single facts to the text as a whole.
TASK_TYPES = ("retrieval", "aggregation", "qa", "few-shot", "summarization", "code", LANGUAGE_MODELLING, OTHER)

# RULER's variable tracking collects statements from all over the context, as its word counts do.
_OF_RULER: dict[RulerCategory, str] = {
    "retrieval": "retrieval",
    "tracing": "aggregation",
    "aggregation": "aggregation",
    "qa": "qa",
}
_OF_LONGBENCH: dict[Category, str] = {
    "single_doc_qa": "qa",
    "multi_doc_qa": "qa",
    "summarization": "summarization",
    "few_shot": "few-shot",
    "synthetic": "retrieval",
    "code": "code",
}


def task_type(task: str) -> str:
    """The type of a task of RULER or of an edition of LongBench, one of `TASK_TYPES`; of any other task, ``other``."""
    if task in TASKS:
        return _OF_RULER[TASKS[task].category]
    try:
        dataset = dataset_of(task)
    except UserError:
        return OTHER
    # counting paragraphs needs all of them, finding one does not
    return "aggregation" if dataset is DATASETS["passage_count"] else _OF_LONGBENCH[dataset.category]
