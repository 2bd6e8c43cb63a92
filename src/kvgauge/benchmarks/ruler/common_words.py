"""Common words extraction: name the words of a list that appear most often (arXiv 2404.06654, section 3.3)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvgauge.benchmarks.ruler.spec import Draft, Draw
from kvgauge.benchmarks.ruler.vocabulary import all_words

MAX_NEW_TOKENS = 120
_OPENING = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
_QUESTION = "Question: What are the 10 most common words in the above list?"
_ANSWER_PREFIX = "Answer: The top 10 words that appear most often in the list are:"
_FULL_LENGTH = 4096  # below this RULER itself uses smaller frequencies


@dataclass(frozen=True)
class Frequencies:
    """How often the common and the other words appear."""

    common: int
    other: int


@dataclass(frozen=True)
class CommonWords:
    """Ten common words among others.

    Attributes:
        frequencies: how often words appear at 4,096 tokens and more; below, 6 and 1, and less where that does not fit.
        num_common: number of common words; the question speaks of ten.
    """

    frequencies: Frequencies = Frequencies(30, 3)
    num_common: int = 10

    def drafts(self, draw: Draw) -> Iterator[Draft]:
        """With a solved example first, as RULER has it, then with a smaller one, then without.

        The size is the number of different words, at least as many others as common ones.
        """
        # a word of the question cannot be an answer: a model that repeats the question must not score
        asked = set(f"{_QUESTION} {_ANSWER_PREFIX}".lower().replace("?", " ").replace(":", " ").split())
        known = [word for word in all_words() if word.lower() not in asked]
        words = draw.rng("words").sample(known, min(len(known), draw.length + 40))
        for_example, for_task = words[:40], words[40:]
        for task, example, example_words in self._ladder(draw.length):
            prefix = ""
            if example is not None:
                common, listed = self._list(for_example[:example_words], example, draw.rng("example"))
                solved = " ".join(_numbered(common))
                prefix = f"{_OPENING}{listed}\n{_QUESTION} {_ANSWER_PREFIX} {solved}\n"

            def context(size: int, prefix: str = prefix, task: Frequencies = task) -> str:
                return f"{prefix}{_OPENING}{self._list(for_task[:size], task, draw.rng('list'))[1]}\n"

            yield Draft(
                context=context,
                question=_QUESTION,
                answer_prefix=_ANSWER_PREFIX,
                answers=tuple(for_task[: self.num_common]),
                smallest=2 * self.num_common,
                largest=len(for_task),
            )

    def _ladder(self, length: int) -> Iterator[tuple[Frequencies, Frequencies | None, int]]:
        """Frequencies of the task and of the example, and the example's words, the most faithful first."""
        if length >= _FULL_LENGTH:
            yield self.frequencies, Frequencies(10, 3), 40
        small, smaller = Frequencies(3, 1), Frequencies(2, 1)
        for common in (6, 4):
            yield Frequencies(common, 1), small, 20
        for common in (4, 3):
            yield Frequencies(common, 1), smaller, 2 * self.num_common
        for common in (6, 4, 3):
            yield Frequencies(common, 1), None, 0

    def _list(self, words: Sequence[str], frequencies: Frequencies, rng: random.Random) -> tuple[Sequence[str], str]:
        common, other = words[: self.num_common], words[self.num_common :]
        listed = [*common] * frequencies.common + [*other] * frequencies.other
        rng.shuffle(listed)
        return common, " ".join(_numbered(listed))


def _numbered(words: Sequence[str]) -> list[str]:
    return [f"{number}. {word}" for number, word in enumerate(words, start=1)]
