"""The 21 datasets: what each one is, in the order of the paper's tables (arXiv 2308.14508, table 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvgauge.errors import unknown

Category = Literal["single_doc_qa", "multi_doc_qa", "summarization", "few_shot", "synthetic", "code"]
Language = Literal["en", "zh", "code"]
Metric = Literal[
    "qa_f1",
    "qa_f1_zh",
    "rouge_l",
    "rouge_l_zh",
    "classification",
    "retrieval",
    "retrieval_zh",
    "count",
    "code_sim",
]
Edition = Literal["standard", "e", "stand_in"]

CATEGORIES: tuple[Category, ...] = (
    "single_doc_qa",
    "multi_doc_qa",
    "summarization",
    "few_shot",
    "synthetic",
    "code",
)
EDITIONS: tuple[Edition, ...] = ("standard", "e", "stand_in")
E_SUFFIX = "_e"
STAND_IN_SUFFIX = "_stand_in"
_SUFFIXES: dict[Edition, str] = {"standard": "", "e": E_SUFFIX, "stand_in": STAND_IN_SUFFIX}


@dataclass(frozen=True)
class Dataset:
    """One dataset of LongBench.

    Attributes:
        name: the official name, also that of its file.
        category: one of the paper's six.
        language: of the texts; the two code datasets count for both languages in the paper's averages.
        metric: its official score, see `kvgauge.benchmarks.longbench.metrics`.
        max_new_tokens: official number of tokens of the answer.
        in_e: whether LongBench-E has it.
        in_stand_in: whether `kvgauge.benchmarks.longbench.stand_in` makes rows of its kind from RULER's sources.
    """

    name: str
    category: Category
    language: Language
    metric: Metric
    max_new_tokens: int
    in_e: bool = False
    in_stand_in: bool = False

    @property
    def chat(self) -> bool:
        """Whether a chat model is asked in its chat template: not where the prompt is a text to be continued."""
        return self.category not in ("few_shot", "code")

    @property
    def first_line_only(self) -> bool:
        """Whether only the answer's first line is scored: few-shot answers run on into further made-up examples."""
        return self.category == "few_shot"


DATASETS: dict[str, Dataset] = {
    dataset.name: dataset
    for dataset in (
        Dataset("narrativeqa", "single_doc_qa", "en", "qa_f1", 128),
        Dataset("qasper", "single_doc_qa", "en", "qa_f1", 128, in_e=True),
        Dataset("multifieldqa_en", "single_doc_qa", "en", "qa_f1", 64, in_e=True, in_stand_in=True),
        Dataset("multifieldqa_zh", "single_doc_qa", "zh", "qa_f1_zh", 64),
        Dataset("hotpotqa", "multi_doc_qa", "en", "qa_f1", 32, in_e=True, in_stand_in=True),
        Dataset("2wikimqa", "multi_doc_qa", "en", "qa_f1", 32, in_e=True),
        Dataset("musique", "multi_doc_qa", "en", "qa_f1", 32),
        Dataset("dureader", "multi_doc_qa", "zh", "rouge_l_zh", 128),
        Dataset("gov_report", "summarization", "en", "rouge_l", 512, in_e=True),
        Dataset("qmsum", "summarization", "en", "rouge_l", 512),
        Dataset("multi_news", "summarization", "en", "rouge_l", 512, in_e=True),
        Dataset("vcsum", "summarization", "zh", "rouge_l_zh", 512),
        Dataset("trec", "few_shot", "en", "classification", 64, in_e=True, in_stand_in=True),
        Dataset("triviaqa", "few_shot", "en", "qa_f1", 32, in_e=True, in_stand_in=True),
        Dataset("samsum", "few_shot", "en", "rouge_l", 128, in_e=True),
        Dataset("lsht", "few_shot", "zh", "classification", 64),
        Dataset("passage_count", "synthetic", "en", "count", 32, in_e=True),
        Dataset("passage_retrieval_en", "synthetic", "en", "retrieval", 32, in_e=True),
        Dataset("passage_retrieval_zh", "synthetic", "zh", "retrieval_zh", 32),
        Dataset("lcc", "code", "code", "code_sim", 64, in_e=True),
        Dataset("repobench-p", "code", "code", "code_sim", 64, in_e=True),
    )
}


def names(edition: Edition) -> tuple[str, ...]:
    """The datasets of an edition, in the paper's order."""
    return tuple(name for name, dataset in DATASETS.items() if _belongs(dataset, edition))


def task_name(name: str, edition: Edition) -> str:
    """The task's name: LongBench-E adds ``_e`` to that of the dataset, the stand-in ``_stand_in``."""
    return name + _SUFFIXES[edition]


def file_name(name: str, edition: Edition) -> str:
    """The name, without ``.jsonl``, of the file that holds a dataset's rows: the official one, in the stand-in too."""
    return name if edition == "stand_in" else task_name(name, edition)


def dataset_of(task: str) -> Dataset:
    """The dataset of a task of any edition.

    Raises:
        UserError: there is no such task.
    """
    for name, dataset in DATASETS.items():
        if any(_belongs(dataset, edition) and task == task_name(name, edition) for edition in EDITIONS):
            return dataset
    raise unknown("LongBench task", task, [task_name(name, edition) for edition in EDITIONS for name in names(edition)])


def _belongs(dataset: Dataset, edition: Edition) -> bool:
    return {"standard": True, "e": dataset.in_e, "stand_in": dataset.in_stand_in}[edition]
