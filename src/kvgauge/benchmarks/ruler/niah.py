"""Needle in a haystack: the eight retrieval tasks of RULER (arXiv 2404.06654, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from kvgauge.benchmarks.ruler.haystack import DEPTHS, NOISE, draw_places, essay, hide_at_depths, hide_at_places
from kvgauge.benchmarks.ruler.spec import Draft, Draw
from kvgauge.benchmarks.ruler.vocabulary import KeyType, draw_key, draw_new

MAX_NEW_TOKENS = 128


@dataclass(frozen=True)
class Niah:
    """One configuration of the needle task.

    Attributes:
        haystack: a repeated noise line, essays, or needles of the same form with other keys.
        key_type: what the needles' keys are.
        value_type: what their values are.
        keys: number of different keys hidden.
        values: values hidden for each key.
        queries: keys asked for.
        depth: of the first needle, percent of the haystack; the others, and all where it is None, stand anywhere.
    """

    haystack: Literal["noise", "essay", "needle"]
    key_type: KeyType = "words"
    value_type: KeyType = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    depth: int | None = None

    def drafts(self, draw: Draw) -> Iterator[Draft]:
        """The one draft of a sample; its size is words of an essay, noise lines, or other needles."""
        rng = draw.rng("needles")
        taken: set[str] = set()
        needles, hidden = [], {}
        for _ in range(self.keys):
            key = draw_new(lambda: draw_key(self.key_type, rng), taken)
            hidden[key] = [draw_new(lambda: draw_key(self.value_type, rng), taken) for _ in range(self.values)]
            needles += [self._needle(key, value) for value in hidden[key]]
        rng.shuffle(needles)
        queries = rng.sample(sorted(hidden), self.queries)
        query = f"{', '.join(queries[:-1])}, and {queries[-1]}" if len(queries) > 1 else queries[0]

        # RULER speaks in the singular where one value is asked for
        if self.queries * self.values == 1:
            thing = self.value_type[:-1]
            opening = f"A special magic {thing} is hidden within the following text."
            question = f"What is the special magic {thing} for {query} mentioned in the provided text?"
            verb = "is"
        else:
            thing = self.value_type
            opening = f"Some special magic {thing} are hidden within the following text."
            question = f"What are all the special magic {thing} for {query} mentioned in the provided text?"
            verb = "are"
        opening += f" Make sure to memorize it. I will quiz you about the {thing} afterwards.\n"

        hide, smallest, largest = self._haystack(draw, needles, taken)
        yield Draft(
            context=lambda size: f"{opening}{hide(size)}\n",
            question=question,
            answer_prefix=f"The special magic {thing} for {query} mentioned in the provided text {verb}",
            answers=tuple(value for key in queries for value in hidden[key]),
            smallest=smallest,
            largest=largest,
        )

    def _placed(self, places: Sequence[float], whole: float) -> list[float]:
        """Places in a haystack of size `whole`, ascending, one of them where it is asked to be."""
        return sorted(places if self.depth is None else [self.depth / 100 * whole, *places[1:]])

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self.value_type} for {key} is: {value}."

    def _haystack(self, draw: Draw, needles: list[str], taken: set[str]) -> tuple[Callable[[int], str], int, int]:
        """How to hide the needles in a haystack of a given size, and the least and greatest size."""
        rng = draw.rng("places")
        if self.haystack == "essay":
            text = essay(draw.sources.essays)
            depths = self._placed(rng.sample(DEPTHS, len(needles)), 100)
            return lambda size: hide_at_depths(needles, depths, text.first(size)), 1, len(text.word_ends)

        places = self._placed(draw_places(len(needles), rng), 1.0)
        if self.haystack == "noise":
            return lambda size: "\n".join(hide_at_places(needles, places, [NOISE] * size)), len(needles), draw.length

        others: list[str] = []
        other_rng = draw.rng("haystack")

        def line() -> str:
            key = draw_new(lambda: draw_key(self.key_type, other_rng), taken)
            return self._needle(key, draw_new(lambda: draw_key(self.value_type, other_rng), taken))

        def hide(size: int) -> str:
            others.extend(line() for _ in range(size - len(others)))
            return "\n".join(hide_at_places(needles, places, others[:size]))

        return hide, len(needles), draw.length
