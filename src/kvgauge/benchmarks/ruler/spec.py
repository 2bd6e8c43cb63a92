"""The words the RULER generator is written in: a draft of a sample, and what a task is."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from kvgauge.corpora.sources import Sources

Category = Literal["retrieval", "tracing", "aggregation", "qa"]
Metric = Literal["string_match_all", "string_match_part"]


@dataclass(frozen=True)
class Draw:
    """What one sample is drawn from: nothing else may influence it, least of all the number of samples."""

    task: str
    length: int
    index: int
    seed: int
    sources: Sources

    def rng(self, purpose: str) -> random.Random:
        """A generator of its own for every purpose, so that one purpose's draws do not shift another's."""
        return random.Random(f"{self.seed}/{self.task}/{self.length}/{self.index}/{purpose}")

    def shared_rng(self, purpose: str) -> random.Random:
        """As `rng`, but the same for every sample and length of the task."""
        return random.Random(f"{self.seed}/{self.task}/{purpose}")


def _as_it_is(size: int) -> int:
    return size


@dataclass(frozen=True)
class Draft:
    """A sample whose haystack may still have any size.

    Attributes:
        context: the context with a haystack of the given size, in the task's own unit (words, noise lines, documents).
            More units never mean noticeably fewer tokens.
        question: see `Sample`.
        answer_prefix: see `Sample`.
        answers: see `Sample`.
        smallest: the least size at which the task makes sense.
        largest: the greatest size there is material for.
        whole: the nearest tidier size not above the given one (whole documents instead of a cut one).
    """

    context: Callable[[int], str]
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    smallest: int
    largest: int
    whole: Callable[[int], int] = _as_it_is


@dataclass(frozen=True)
class TaskSpec:
    """One RULER task.

    Attributes:
        name: the official name.
        category: the paper's category (arXiv 2404.06654, section 3).
        max_new_tokens: official number of tokens of the answer.
        metric: the official score, see `kvgauge.benchmarks.ruler.scoring`.
        drafts: drafts of one sample, the most faithful first; later ones are for lengths where the first does not fit.
    """

    name: str
    category: Category
    max_new_tokens: int
    metric: Metric
    drafts: Callable[[Draw], Iterator[Draft]]
