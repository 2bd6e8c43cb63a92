"""LongBench as a benchmark: the configuration of ``conf/benchmark/longbench*.yaml``, and what is done with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvgauge.benchmarks.longbench.averages import averages
from kvgauge.benchmarks.longbench.datasets import DATASETS, EDITIONS, Category, dataset_of, names
from kvgauge.benchmarks.longbench.metrics import score
from kvgauge.benchmarks.longbench.sample import load
from kvgauge.contract.benchmark import OTHER, Benchmark, Overlong
from kvgauge.errors import UserError, unknown
from kvgauge.prompts.length import TokenCounter
from kvgauge.prompts.samples import Sample

_KINDS: dict[Category, str] = {
    "single_doc_qa": "qa",
    "multi_doc_qa": "qa",
    "summarization": "summarization",
    "few_shot": "few-shot",
    "synthetic": "retrieval",
    "code": "code",
}


@dataclass(frozen=True, kw_only=True)
class LongBench(Benchmark):
    """An edition of LongBench.

    Attributes:
        tasks: names of `kvgauge.benchmarks.longbench.DATASETS`, or ``"all"`` of the edition; a tuple of names
            afterwards.
        edition: ``standard`` (21 datasets), ``e`` (LongBench-E: 13 datasets of even lengths) or ``stand_in`` (4 of
            LongBench's kinds over other texts, see `kvgauge.benchmarks.longbench.stand_in`).
        samples: samples per dataset, drawn with `seed`; more of them add to those there are; None for all.
        source: ``hub``, a directory with the official JSON Lines files (or with their folder ``data``), or their
            ``data.zip``.
        max_length: tokens of the assembled prompt and its answer together, at most: the middle of a longer prompt is
            left out. None leaves prompts whole; evaluation then cuts those that exceed the model's positions.
        seed: of the draw.
        chat: use the tokenizer's chat template, except where the benchmark never does (few-shot learning and code).

    Raises:
        UserError: an unknown task or edition, or a number below one.
    """

    name: str = "longbench"
    tasks: str | Sequence[str] = "all"
    edition: str = "standard"
    samples: int | None = None
    source: str = "hub"
    max_length: int | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        if self.edition not in EDITIONS:
            raise unknown("LongBench edition", str(self.edition), EDITIONS)
        known = names(self.edition)
        chosen = (self.tasks,) if isinstance(self.tasks, str) else tuple(self.tasks)
        tasks = known if chosen == ("all",) else chosen
        for task in tasks:
            if task not in known:
                raise unknown(f"LongBench dataset (edition {self.edition})", str(task), [*known, "all"])
        object.__setattr__(self, "tasks", tasks)
        if not tasks:
            raise UserError("benchmark longbench needs at least one dataset: set tasks to all or to a list")
        for field in ("samples", "max_length"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise UserError(
                    f"benchmark longbench: {field} is {value}: set it to 1 or more, or to null for no limit"
                )

    def prompts(self, counter: TokenCounter) -> Iterator[Sample]:
        """Every sample of every dataset, in the paper's order; errors as `load`."""
        return load(self, counter.tokenizer)

    def score(self, sample: Sample, answer: str) -> float:
        """The dataset's official score; errors as `kvgauge.benchmarks.longbench.score`."""
        return score(sample.task, answer, sample.answers, sample.facts.get("all_classes"))

    @property
    def overlong(self) -> Overlong:
        """The middle of a long context is left out, as the official script does."""
        return "truncate"

    def kind(self, task: str) -> str:
        """By the paper's category of the dataset; counting paragraphs needs all of them, finding one does not."""
        try:
            dataset = dataset_of(task)
        except UserError:
            return OTHER
        return "aggregation" if dataset is DATASETS["passage_count"] else _KINDS[dataset.category]

    def averages(self, cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Of the six categories, and over them; see `kvgauge.benchmarks.longbench.averages`."""
        return averages(cells)
