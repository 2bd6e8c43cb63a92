"""The words, numbers and identifiers that RULER hides and asks for."""

from __future__ import annotations

import random
import string
import uuid
from collections.abc import Callable
from functools import cache
from typing import Literal

from wonderwords import RandomWord

KeyType = Literal["words", "numbers", "uuids"]


@cache
def words_of(category: Literal["noun", "adjective", "verb"]) -> tuple[str, ...]:
    """The English words of one category, sorted."""
    return tuple(sorted(set(RandomWord().filter(include_categories=[category]))))


@cache
def all_words() -> tuple[str, ...]:
    """Nouns, adjectives and verbs, each once, sorted."""
    return tuple(sorted({*words_of("noun"), *words_of("adjective"), *words_of("verb")}))


def draw_key(kind: KeyType, rng: random.Random) -> str:
    """A needle's key or value: an adjective-noun pair, a number of 7 digits, or a UUID (version 4)."""
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return f"{rng.choice(words_of('adjective'))}-{rng.choice(words_of('noun'))}"


def draw_letters(alphabet: str, size: int, rng: random.Random) -> str:
    """A made-up word of `size` letters."""
    return "".join(rng.choices(alphabet, k=size))


def draw_variable(size: int, rng: random.Random) -> str:
    """A variable's name: `size` capital letters."""
    return draw_letters(string.ascii_uppercase, size, rng)


def draw_coded_word(size: int, rng: random.Random) -> str:
    """A coded word: `size` small letters."""
    return draw_letters(string.ascii_lowercase, size, rng)


def draw_new(draw: Callable[[], str], taken: set[str]) -> str:
    """The next word that `draw` gives and that is not taken; it is taken from then on."""
    while (word := draw()) in taken:
        pass
    taken.add(word)
    return word
