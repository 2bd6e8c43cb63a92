"""Variable tracking: follow one chain of assignments through noise (arXiv 2404.06654, section 3.2)."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kvgauge.benchmarks.ruler.haystack import NOISE, draw_places, hide_at_places
from kvgauge.benchmarks.ruler.spec import Draft, Draw
from kvgauge.benchmarks.ruler.vocabulary import draw_new, draw_variable

MAX_NEW_TOKENS = 30
_EXAMPLE_NOISE = (
    10  # noise lines of the solved example at _EXAMPLE_LENGTH tokens and more, as RULER's search finds them
)
_EXAMPLE_LENGTH = 4096


@dataclass(frozen=True)
class _Problem:
    context: Callable[[int], str]
    question: str
    answer_prefix: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class VariableTracking:
    """One chain ``VAR A = 12345``, ``VAR B = VAR A``, ...: every variable of it is asked for.

    Attributes:
        hops: assignments from variable to variable.
    """

    hops: int = 4

    def drafts(self, draw: Draw) -> Iterator[Draft]:
        """First with a solved example before the task, as RULER has it; without where that does not fit.

        The size is noise lines. Below 4,096 tokens the example's noise shrinks and leaves the room to the task.
        """
        taken: set[str] = set()
        task = self._problem(draw.rng("chain"), 5, taken)
        example = self._problem(draw.rng("example"), 3, taken)
        lines = min(max(draw.length * _EXAMPLE_NOISE // _EXAMPLE_LENGTH, 1), _EXAMPLE_NOISE)
        solved = f"{example.context(lines)}{example.question} {example.answer_prefix} {' '.join(example.answers)}\n\n"
        for prefix in (solved, ""):
            yield Draft(
                context=lambda size, prefix=prefix: prefix + task.context(size),  # type: ignore[misc]
                question=task.question,
                answer_prefix=task.answer_prefix,
                answers=task.answers,
                smallest=1,
                largest=draw.length,
            )

    def _problem(self, rng: random.Random, letters: int, taken: set[str]) -> _Problem:
        value = draw_new(lambda: str(rng.randint(10_000, 99_999)), taken)
        variables = [draw_new(lambda: draw_variable(letters, rng), taken) for _ in range(self.hops + 1)]
        chain = [f"VAR {variables[0]} = {value}"]
        chain += [f"VAR {after} = VAR {before}" for before, after in itertools.pairwise(variables)]
        places = draw_places(len(chain), rng)

        def context(lines: int) -> str:
            haystack = [f"{NOISE}\n"] * lines
            if lines <= len(chain):
                # too few lines to keep the assignments apart: put them between sentences, as RULER does
                haystack = re.split(r"(?<=\.) ", NOISE) * (lines - 1) + re.split(r"(?<=\.) ", f"{NOISE}\n")
            text = " ".join(hide_at_places(chain, places, haystack))
            return f"Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{text}\n"

        return _Problem(
            context=context,
            question=f"Question: Find all variables that are assigned the value {value} in the text above.",
            # "assgined" is how RULER spells it
            answer_prefix=(
                "Answer: According to the chain(s) of variable assignment in the text above, "
                f"{len(variables)} variables are assgined the value {value}, they are:"
            ),
            answers=tuple(variables),
        )
