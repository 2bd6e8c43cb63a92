"""Any generation or likelihood task of the installed lm-eval as a benchmark of the pipeline."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvgauge.benchmarks.lm_eval_task.loading import load_tasks
from kvgauge.contract.benchmark import Benchmark
from kvgauge.errors import UserError
from kvgauge.prompts.length import TokenCounter
from kvgauge.prompts.samples import Sample

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from kvgauge.benchmarks.lm_eval_task.scoring import Scorer


@dataclass(frozen=True, kw_only=True)
class LmEval(Benchmark):
    """Tasks of lm-evaluation-harness (Gao et al., https://github.com/EleutherAI/lm-evaluation-harness).

    Documents, prompts, few shots, filters and metrics are made by lm-eval's own `Task` objects; prefill, compression
    and decoding are the pipeline's. What is context is what the task says (``metadata: {context: field or template}``
    in its file, or a field ``context`` of its documents); else all but the last `tail` tokens. Every row of the results
    says which, as ``split``. All figures of an answer stand in its ``details``.

    Attributes:
        tasks: names of tasks, groups or tags, or paths of task files; a tuple afterwards.
        samples: documents of each task, from its first; None for all. lm-eval's ``--limit``.
        num_fewshot: examples in a prompt; None leaves the tasks theirs.
        include_path: a directory with task files of your own, lm-eval's ``--include_path``.
        metric: what the score is; None takes the first metric of a task that runs from 0 to 1 and is averaged over
            documents.
        filter: which of a task's filters the score is taken behind; None for the first.
        tail: tokens that are read after the compression where a task does not say what its context is.
        max_new_tokens: of an answer; None leaves the tasks theirs.
        max_length: tokens of prompt and answer, at most: longer prompts lose their beginning, as in lm-eval. None
            leaves them whole; evaluation then refuses those that exceed the model's positions.
        as_run: answer tasks that want sampled answers as the run decodes.
        seed: of the draw of examples; lm-eval's own unless set.
        chat: lm-eval's ``--apply_chat_template``.

    Raises:
        UserError: no tasks, a number out of range, or no such directory.
    """

    name: str = "lm_eval"
    tasks: Sequence[str] = ()
    samples: int | None = None
    num_fewshot: int | None = None
    include_path: str | None = None
    metric: str | None = None
    filter: str | None = None
    tail: int = 1
    max_new_tokens: int | None = None
    max_length: int | None = None
    as_run: bool = False
    seed: int = 1234
    chat: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", (self.tasks,) if isinstance(self.tasks, str) else tuple(self.tasks))
        if not self.tasks:
            raise UserError("benchmark lm_eval needs tasks: name some, e.g. benchmark.tasks=[gsm8k]")
        for number in ("samples", "num_fewshot", "tail", "max_new_tokens", "max_length"):
            value, least = getattr(self, number), 0 if number == "num_fewshot" else 1
            if value is not None and value < least:
                raise UserError(f"benchmark lm_eval: {number} is {value}: set it to {least} or more")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise UserError(
                f"benchmark lm_eval: there is no directory {self.include_path!r}: set benchmark.include_path to the "
                f"one with your task files"
            )

    def identity(self) -> dict[str, Any]:
        """lm-eval's version, and a hash of the files below `include_path`."""
        known: dict[str, Any] = {"lm_eval": version("lm_eval")}
        own = [Path(self.include_path)] if self.include_path else []
        own += [Path(task) for task in self.tasks if Path(task).is_file()]
        if own:
            known["files"] = _hash_of(own)
        return known

    def prompts(self, counter: TokenCounter) -> Iterator[Sample]:
        """Every document of every task, in lm-eval's order; errors as `load_tasks` and `samples_of`."""
        from kvgauge.benchmarks.lm_eval_task.prompts import samples_of

        for name, task in self.loaded.items():
            yield from samples_of(self, name, task, counter.tokenizer)

    def score(self, sample: Sample, answer: str) -> float:
        """The chosen metric of lm-eval's `process_results`; errors as `Scorer.score`."""
        return self._scorer(sample.task).score(sample, answer)

    def details(self, sample: Sample, answer: str) -> dict[str, float]:
        """Every figure of lm-eval's `process_results`, as ``metric,filter``."""
        return self._scorer(sample.task).figures(sample, answer)

    def kind(self, task: str) -> str:
        """``generation`` or ``likelihood``."""
        from kvgauge.benchmarks.lm_eval_task.loading import is_generation

        return "generation" if is_generation(self.loaded[task]) else "likelihood"

    @cached_property
    def loaded(self) -> dict[str, Task]:
        """The tasks by name; groups and tags as all of theirs. Loaded at the first use: that takes seconds."""
        return load_tasks(self.tasks, self.include_path, self.num_fewshot, self.seed)

    @cached_property
    def _scorers(self) -> dict[str, Scorer]:
        return {}

    def _scorer(self, task: str) -> Scorer:
        from kvgauge.benchmarks.lm_eval_task.scoring import Scorer

        if task not in self._scorers:
            self._scorers[task] = Scorer(self.loaded[task], self.metric, self.filter)
        return self._scorers[task]


def _hash_of(places: Sequence[Path]) -> str:
    """A hash of files, and of all files below directories, by their names and contents."""
    value = hashlib.sha256()
    for place in places:
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.is_file() and "__pycache__" not in path.parts:
                value.update(f"{path.relative_to(place.parent)}\0".encode() + path.read_bytes())
    return value.hexdigest()[:16]
