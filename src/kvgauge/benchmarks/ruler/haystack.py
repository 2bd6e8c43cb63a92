"""What needles are hidden in, and where."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import nupunkt

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
# 40 depths from 0% to 100%, rounded half to even as the official numpy code does
DEPTHS = tuple(round(100 * step / 39) for step in range(40))


@dataclass(frozen=True)
class Essay:
    """A text with single blanks, cut into sentences.

    Attributes:
        text: the text.
        sentences: ``[start, end)`` of each sentence.
        word_ends: end of each blank-separated word.
    """

    text: str
    sentences: tuple[tuple[int, int], ...]
    word_ends: tuple[int, ...]

    def first(self, words: int) -> list[str]:
        """The sentences of the first `words` words; the last one may be cut after a word, as RULER does."""
        cut = self.word_ends[words - 1] if words else 0
        reached = itertools.takewhile(lambda span: span[0] < cut, self.sentences)
        return [self.text[start : min(end, cut)].strip() for start, end in reached]


@lru_cache(maxsize=2)
def essay(text: str) -> Essay:
    """Split a text once for all the samples that are made of it."""
    text = re.sub(r"\s+", " ", text).strip()
    return Essay(
        text=text,
        sentences=tuple((start, end) for start, end in nupunkt.sent_spans(text)),
        word_ends=tuple(match.end() for match in re.finditer(r"\S+", text)),
    )


def hide_at_depths(needles: Sequence[str], depths: Sequence[float], sentences: Sequence[str]) -> str:
    """`sentences` as one text, each needle at its depth (percent of the sentences; depths ascending)."""
    parts: list[str] = []
    start = 0
    for needle, depth in zip(needles, depths, strict=True):
        end = int(len(sentences) * depth // 100)
        parts += [*sentences[start:end], needle]
        start = end
    return " ".join([*parts, *sentences[start:]])


def draw_places(count: int, rng: random.Random) -> list[float]:
    """Where `count` items go in a haystack of any size: ascending fractions of it."""
    return sorted(rng.random() for _ in range(count))


def hide_at_places(items: Sequence[str], places: Sequence[float], haystack: Sequence[str]) -> list[str]:
    """`haystack` with each item before a line of its own, as long as there are as many lines as items."""
    slots = max(len(haystack) - len(items) + 1, 1)
    result = list(haystack)
    for index, (item, place) in enumerate(zip(items, places, strict=True)):
        # the items before it have moved the lines by `index`, and their own lines are taken: twice the index
        result.insert(int(place * slots) + 2 * index, item)
    return result
