"""InfiniteBench as a benchmark: the official rows, or those of its stand-in."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from statistics import fmean
from typing import Any

from kvgauge.benchmarks.infinitebench.tasks import TASKS, Task
from kvgauge.benchmarks.longbench.truncation import fit
from kvgauge.contract.benchmark import OTHER, Benchmark, Overlong, means_by_setting
from kvgauge.corpora.official import OfficialFiles, text_of
from kvgauge.errors import UserError, unknown
from kvgauge.prompts.encoding import Template
from kvgauge.prompts.length import TokenCounter
from kvgauge.prompts.samples import Sample

DATASET = "xinrongzhang2022/InfiniteBench"
ADVICE = f"get the files of the hub's dataset {DATASET} and set benchmark.source to their directory"
STAND_IN_ADVICE = (
    "make them with python -m kvgauge.benchmarks.infinitebench.stand_in <directory> and set benchmark.source to that "
    "directory"
)
SUFFIX = "_stand_in"


@dataclass(frozen=True, kw_only=True)
class InfiniteBench(Benchmark):
    """Tasks of InfiniteBench, or of its stand-in.

    Attributes:
        tasks: names of `kvgauge.benchmarks.infinitebench.tasks.TASKS`, or ``"all"``; a tuple of names afterwards.
        samples: per task, drawn with the seed; more of them add to those there are. None for all.
        source: ``hub``, or a directory with the official JSON Lines files.
        max_length: tokens of the assembled prompt and its answer together, at most: the middle of a longer text is
            left out. None leaves prompts whole; evaluation then cuts those that exceed the model's positions.
        stand_in: the rows are those of `kvgauge.benchmarks.infinitebench.stand_in`: tasks end in ``_stand_in``.
        seed: of the draw.

    Raises:
        UserError: an unknown task, or a number below one.
    """

    name: str = "infinitebench"
    tasks: str | Sequence[str] = "all"
    samples: int | None = None
    source: str = "hub"
    max_length: int | None = None
    stand_in: bool = False
    seed: int = 42

    def __post_init__(self) -> None:
        known = [name for name, task in TASKS.items() if task.in_stand_in or not self.stand_in]
        chosen = (self.tasks,) if isinstance(self.tasks, str) else tuple(self.tasks)
        tasks = tuple(known) if chosen == ("all",) else chosen
        for task in tasks:
            if task not in known:
                raise unknown(f"task of benchmark {self.name}", str(task), [*known, "all"])
        object.__setattr__(self, "tasks", tasks)
        if not tasks:
            raise UserError(f"benchmark {self.name} needs at least one task: set tasks to all or to a list")
        for field in ("samples", "max_length"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise UserError(f"benchmark {self.name}: {field} is {value}: set it to 1 or more, or to null")

    def identity(self) -> dict[str, Any]:
        """The version of lm-eval, which carries prompts and scores."""
        return {"lm_eval": version("lm_eval")}

    def prompts(self, counter: TokenCounter) -> Iterator[Sample]:
        """Every sample of every task, in that order.

        Raises:
            UserError: files are missing, out of reach or damaged, or a row is not an official one.
        """
        files = OfficialFiles("InfiniteBench", DATASET, self.source, STAND_IN_ADVICE if self.stand_in else ADVICE)
        found = files.find([f"{name}.jsonl" for name in self.tasks])
        for name in self.tasks:
            path = found[f"{name}.jsonl"]
            rows = list(files.rows(path))
            order = random.Random(f"{self.seed}/{name}").sample(range(len(rows)), len(rows))
            for index in sorted(order[: self.samples]):
                number, row = rows[index]
                try:
                    checked = _checked(TASKS[name], row)
                except (KeyError, ValueError) as error:
                    raise files.bad_row(path, number, error) from error
                yield self._sample(counter, TASKS[name], checked, index)

    def _sample(self, counter: TokenCounter, task: Task, row: Mapping[str, Any], index: int) -> Sample:
        from kvgauge.benchmarks.infinitebench.tasks import parts

        limit = None if self.max_length is None else self.max_length - task.max_new_tokens
        context, question = parts(task, row)
        fitted = fit(counter.tokenizer, Template.of(counter.tokenizer, self.chat), context, question, limit)
        return Sample(
            id=f"{task.file}-{index:04d}",
            task=task.file + (SUFFIX if self.stand_in else ""),
            context=fitted.context,
            question=fitted.question,
            answers=tuple(row["answer"]),
            max_new_tokens=task.max_new_tokens,
            length=self.max_length or 0,
            tokens=fitted.tokens + task.max_new_tokens,
            facts={"options": list(row["options"]), "truncated": fitted.truncated},
        )

    def score(self, sample: Sample, answer: str) -> float:
        """lm-eval's score of the task, which is the official one.

        Raises:
            UserError: a task that is not InfiniteBench's.
        """
        from kvgauge.benchmarks.infinitebench.tasks import score  # imports lm-eval, which takes seconds

        name = sample.task.removesuffix(SUFFIX)
        if name not in TASKS:
            raise unknown("InfiniteBench task", sample.task, TASKS)
        row = {"answer": list(sample.answers), "options": list(sample.facts["options"])}
        return score(TASKS[name], row, answer)

    @property
    def overlong(self) -> Overlong:
        """The middle of a long text is left out, as the official script does."""
        return "truncate"

    def kind(self, task: str) -> str:
        """By what the task is: a number in a list needs all of the list."""
        name = task.removesuffix(SUFFIX)
        return TASKS[name].kind if name in TASKS else OTHER

    def averages(self, cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The mean of the tasks, as papers print it."""
        known = [name for name, task in TASKS.items() if task.in_stand_in or not self.stand_in]
        return [
            setting | {"average": "average", "mean": fmean(means.values()), "complete": len(means) == len(known)}
            for setting, means in means_by_setting(cells)
        ]


def _checked(task: Task, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with what its prompt and score need.

    Raises:
        KeyError, ValueError: it is not an official one.
    """
    answers, options = row["answer"], row.get("options") or []
    answers = answers if isinstance(answers, list) else [answers]
    if not answers or not all(isinstance(answer, str | int | float) for answer in answers):
        raise ValueError("answer is not a list of references")
    if task.options and (len(options) != 4 or str(answers[0]) not in [*options, *"ABCD"]):
        raise ValueError("options are not four answers, one of them the right one")
    return {
        "context": text_of(row, "context"),
        "input": text_of(row, "input"),
        "answer": [str(answer) for answer in answers],
        "options": [str(option) for option in options],
    }
