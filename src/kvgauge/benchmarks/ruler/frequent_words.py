"""Frequent words extraction: the three most frequent coded words of a zeta distribution (arXiv 2404.06654, 3.3)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from scipy.special import zeta

from kvgauge.benchmarks.ruler.spec import Draft, Draw
from kvgauge.benchmarks.ruler.vocabulary import draw_coded_word, draw_new

MAX_NEW_TOKENS = 50
_OPENING = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. "
)
_QUESTION = (
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
_ANSWER_PREFIX = "Answer: According to the coded text above, the three most frequently appeared words are:"
_ASKED = 3
_TOKENS_PER_WORD = 50  # RULER's vocabulary has one word for every 50 tokens of the length


@dataclass(frozen=True)
class FrequentWords:
    """Coded words with frequencies ``size * rank**-alpha / zeta(alpha)``; the most frequent one is noise, three dots.

    Attributes:
        alpha: exponent of the zeta distribution.
        word_letters: letters of a coded word.
    """

    alpha: float = 2.0
    word_letters: int = 6

    def drafts(self, draw: Draw) -> Iterator[Draft]:
        """The one draft of a sample; its size is the number of words drawn from the whole distribution."""
        rng = draw.rng("vocabulary")
        taken: set[str] = set()
        # at least one word that is not asked for, or there would be nothing to tell the answers from
        count = max(draw.length // _TOKENS_PER_WORD, _ASKED + 2)
        coded = [draw_new(lambda: draw_coded_word(self.word_letters, rng), taken) for _ in range(count - 1)]
        vocabulary = ["...", *coded]
        shares = [rank**-self.alpha / float(zeta(self.alpha)) for rank in range(1, count + 1)]

        def context(size: int) -> str:
            words = [word for word, share in zip(vocabulary, shares, strict=True) for _ in range(int(size * share))]
            draw.rng("order").shuffle(words)
            return f"{_OPENING}{' '.join(words)}\n"

        yield Draft(
            context=context,
            question=_QUESTION,
            answer_prefix=_ANSWER_PREFIX,
            answers=tuple(coded[:_ASKED]),
            # from here on the last answer is always more frequent than the next word, whole numbers or not
            smallest=math.ceil(1 / (shares[_ASKED] - shares[_ASKED + 1])),
            largest=draw.length,
        )
