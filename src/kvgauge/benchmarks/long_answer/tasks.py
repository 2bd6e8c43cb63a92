"""What is asked for: a numbered text, and the numbered answer that is the only right one.

A line of an answer needs its line of the text, and in `chain` and `tally` also what the answer itself said before: the
last value, the last count. So a cache that has lost the model's own words fails there, whatever it kept of the prompt.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvgauge.benchmarks.ruler.vocabulary import words_of

ADDED = "one"
COUNTED = ("apple", "pear", "plum", "fig")  # few enough for counts to grow
LARGEST = 20  # value of a chain: sums that a small model can do
STEP = 6


@dataclass(frozen=True)
class Lines:
    """A text and its answer, line by line, without their numbers."""

    text: tuple[str, ...]
    answer: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A kind of long answer.

    Attributes:
        heading: stands over the text.
        asked: stands between the text and its answer.
        kind: of `kvgauge.contract.benchmark.KINDS`, or a word of its own.
        draw: makes so many lines; fewer lines of the same seed are the first of more.
    """

    heading: str
    asked: str
    kind: str
    draw: Callable[[random.Random, int], Lines]


def _pairs(rng: random.Random, count: int) -> list[str]:
    """Two words a line, none of them in another line as long as there are enough: a line is then told by its words."""
    adjectives, nouns = words_of("adjective"), words_of("noun")
    first, second = rng.sample(adjectives, len(adjectives)), rng.sample(nouns, len(nouns))
    return [f"{first[line % len(first)]} {second[line % len(second)]}" for line in range(count)]


def recite(rng: random.Random, count: int) -> Lines:
    """Two words a line, again."""
    lines = tuple(_pairs(rng, count))
    return Lines(lines, lines)


def transform(rng: random.Random, count: int) -> Lines:
    """Two words a line, with a third in front."""
    lines = _pairs(rng, count)
    return Lines(tuple(lines), tuple(f"{ADDED} {line}" for line in lines))


def chain(rng: random.Random, count: int) -> Lines:
    """Sums of which each starts from the result of the one before; values from 0 to `LARGEST`."""
    value = rng.randrange(1, LARGEST)
    text = [f"start with {value}"]
    answer = [f"{text[0]}: {value}"]
    for _ in range(count - 1):
        step = rng.choice([step for step in range(-STEP, STEP + 1) if step and 0 <= value + step <= LARGEST])
        text.append(f"{'add' if step > 0 else 'subtract'} {abs(step)}")
        answer.append(f"{text[-1]}: {value} {'+' if step > 0 else '-'} {abs(step)} = {value + step}")
        value += step
    return Lines(tuple(text), tuple(answer))


def tally(rng: random.Random, count: int) -> Lines:
    """Words with how often each was said until then."""
    seen: Counter[str] = Counter()
    text, answer = [], []
    for _ in range(count):
        word = rng.choice(COUNTED)
        seen[word] += 1
        text.append(word)
        answer.append(f"{word} {seen[word]}")
    return Lines(tuple(text), tuple(answer))


TASKS: dict[str, Task] = {
    "recite": Task("List", "The same list", "retrieval", recite),
    "transform": Task("List", f"The list with the word {ADDED} in front of each line", "retrieval", transform),
    "chain": Task("Steps", "The steps worked out", "reasoning", chain),
    "tally": Task("Words", "The words with how often each was there so far", "aggregation", tally),
}


def numbered(lines: Sequence[str], start: int) -> str:
    """Lines with their numbers, from `start`."""
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, start=start))
