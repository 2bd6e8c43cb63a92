"""The contract of a benchmark: its prompts, how their answers are scored, and what kinds of tasks it has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from kvgauge.configuration import path_of
from kvgauge.errors import UserError, unknown

if TYPE_CHECKING:
    from kvgauge.prompts.length import TokenCounter
    from kvgauge.prompts.samples import Sample

Overlong = Literal["refuse", "truncate"]

# Kinds of tasks that several benchmarks have, from single facts to the text as a whole; a benchmark may name others.
KINDS = ("retrieval", "aggregation", "qa", "few-shot", "summarization", "code")
OTHER = "other"

SETTING = ("cell", "method", "budget", "compress_at", "model", "length")  # what means of tasks may be averaged over
AVERAGE_KEYS = (*SETTING, "average", "mean")


@dataclass(frozen=True, kw_only=True)
class Benchmark(ABC):
    """What every method is asked; subclasses are frozen dataclasses whose fields are the configuration.

    Attributes:
        name: the name under which prompts and results are reported.
        chat: use the tokenizer's chat template, where a sample does not say itself.
    """

    name: str
    chat: bool = True

    @abstractmethod
    def prompts(self, counter: TokenCounter) -> Iterator[Sample]:
        """Every sample, in the order of the results; the same ones every time.

        Args:
            counter: tells how long a prompt is, and has the model's tokenizer.

        Raises:
            UserError: sources are missing, or what is asked for cannot be made.
        """

    @abstractmethod
    def score(self, sample: Sample, answer: str) -> float:
        """The score of one answer, from 0 to 1.

        Args:
            sample: as `prompts` made it.
            answer: the generated text, without the answer prefix.

        Raises:
            UserError: a sample that cannot be scored.
        """

    def details(self, sample: Sample, answer: str) -> dict[str, float]:
        """Other figures of an answer, by name: they stand beside its score in the results."""
        return {}

    def identity(self) -> dict[str, Any]:
        """What prompts and scores depend on beyond its configuration and its code, JSON-like: files, versions.

        Raises:
            UserError: a file of it is missing.
        """
        return {}

    @property
    def total(self) -> int | None:
        """How many samples `prompts` yields; None where that is not known beforehand."""
        return None

    @property
    def overlong(self) -> Overlong:
        """What becomes of a prompt longer than the model's positions: it is refused, or its context loses its middle.

        A context may only be cut where what is asked for does not stand in one place of it.
        """
        return "refuse"

    def kind(self, task: str) -> str:
        """What kind of task a task is: one of `KINDS`, or a word of the benchmark's own."""
        return OTHER

    def averages(self, cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
        """The averages that papers print beside the means of tasks; None where there are none.

        Args:
            cells: rows as `kvgauge.evaluation.statistics.summarise` makes them; `means_by_setting` sorts them.

        Returns:
            Rows with the keys of `AVERAGE_KEYS`: those of the cells, the name of the average (a column of the report)
            and its mean, from 0 to 1. ``complete`` (False: not every task that belongs to it was run) and ``tasks`` may
            stand beside them, and whatever else tells rows of one cell apart, e.g. a language.
        """
        return None

    @property
    def least_turns(self) -> int:
        """How many questions of one context have to be asked in one conversation for their scores to mean anything."""
        return 1

    def turns(self, samples: Sequence[Sample], count: int) -> list[Sample]:
        """The samples as conversations of `count` questions, 2 or more, about each context, in their order.

        As they are, samples become turns of one conversation where they share a context.

        Raises:
            UserError: a context has not so many questions.
        """
        return list(samples)


def as_benchmark(built: object) -> Benchmark:
    """`built`, if it is a benchmark.

    Raises:
        UserError: it is something else, or wants something else done with overlong prompts.
    """
    if not isinstance(built, Benchmark):
        raise UserError(
            f"{path_of(built)} is no benchmark: it has to be a subclass of kvgauge.Benchmark, "
            f"see docs/adding-a-benchmark.md"
        )
    if built.overlong not in get_args(Overlong):
        raise unknown(f"way with overlong prompts of benchmark {built.name}", str(built.overlong), get_args(Overlong))
    return built


def means_by_setting(cells: Iterable[Mapping[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, float]]]:
    """The keys `SETTING` of every cell and length, with the means of its tasks.

    Args:
        cells: rows with these keys, ``task`` and ``mean``; those of the task "all" are passed over.
    """
    settings: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in cells:
        if row["task"] != "all":
            settings.setdefault(tuple(row[key] for key in SETTING), {})[row["task"]] = float(row["mean"])
    for setting, means in settings.items():
        yield dict(zip(SETTING, setting, strict=True)), means
