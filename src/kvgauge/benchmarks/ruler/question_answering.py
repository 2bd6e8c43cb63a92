"""Question answering among distractor documents (arXiv 2404.06654, section 3.4)."""

from __future__ import annotations

import bisect
import itertools
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import nupunkt

from kvgauge.benchmarks.ruler.spec import Draft, Draw
from kvgauge.corpora.questions import Question, QuestionSet
from kvgauge.errors import UserError

MAX_NEW_TOKENS = 32
_INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)


@dataclass(frozen=True)
class _Piece:
    """Characters ``[start, end)`` of a document, and how many words they are."""

    document: int
    start: int
    end: int
    words: int


@dataclass(frozen=True)
class QuestionAnswering:
    """A question whose gold documents stand among others, in random order.

    Attributes:
        dataset: SQuAD 2.0 or HotpotQA.
    """

    dataset: Literal["squad", "hotpotqa"]

    def drafts(self, draw: Draw) -> Iterator[Draft]:
        """The one draft of a sample; its size is words of documents.

        Words are spent in this order: the sentences the answer rests on, the rest of the gold documents, related
        documents, any documents. So a document is cut only where whole ones do not fit or leave the length unfilled.

        Raises:
            UserError: more samples are asked for than the dataset has questions.
        """
        data = draw.sources.squad if self.dataset == "squad" else draw.sources.hotpotqa
        if draw.index >= len(data.questions):
            raise UserError(
                f"task {draw.task} has {len(data.questions)} questions, sample {draw.index + 1} was asked for: "
                "ask for fewer samples"
            )
        # the whole order: a shorter draw need not begin like a longer one, and samples must differ
        order = draw.shared_rng("questions").sample(range(len(data.questions)), len(data.questions))
        question = data.questions[order[draw.index]]
        rng = draw.rng("documents")
        pieces, boundaries, smallest = _pieces(data, question, self._others(data, question, draw, rng), draw.length)
        places: dict[int, float] = defaultdict(rng.random)
        for piece in pieces:
            places[piece.document]
        ends = list(itertools.accumulate(piece.words for piece in pieces))

        def whole(size: int) -> int:
            fitting = bisect.bisect_right(boundaries, size)
            return boundaries[fitting - 1] if fitting else size

        def context(size: int) -> str:
            kept = _first_words(data.documents, pieces, ends, size)
            documents = [kept[document] for document in sorted(kept, key=places.__getitem__)]
            listed = "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(documents, start=1))
            return f"{_INSTRUCTION}\n\nThe following are given documents.\n\n{listed}\n\n"

        yield Draft(
            context=context,
            question=f"{_INSTRUCTION}\n\nQuestion: {question.query}",
            answer_prefix="Answer:",
            answers=question.answers,
            smallest=smallest,
            largest=ends[-1],
            whole=whole,
        )

    @staticmethod
    def _others(data: QuestionSet, question: Question, draw: Draw, rng: random.Random) -> Iterator[int]:
        """Distractors: related documents first, then any others, each group in random order."""
        seen = {*question.gold, *question.related}
        yield from rng.sample(question.related, len(question.related))
        # every document has a word and every word a token, so no more than this many can fit
        wanted = min(len(data.documents), draw.length + len(seen))
        yield from (index for index in rng.sample(range(len(data.documents)), wanted) if index not in seen)


def _pieces(
    data: QuestionSet, question: Question, others: Iterator[int], length: int
) -> tuple[list[_Piece], list[int], int]:
    """Pieces in the order they are spent, the sizes at which no document is cut, and the size of the evidence."""
    essential: list[_Piece] = []
    rest: list[_Piece] = []
    for document in question.gold:
        text = data.documents[document]
        marks = [(part.start, part.end) for part in question.evidence if part.document == document]
        for start, end in _sentences(text):
            needed = any(first < end and start < last for first, last in marks)
            (essential if needed else rest).append(_piece(document, text, start, end))
    pieces = essential + rest
    smallest = sum(piece.words for piece in essential)
    total = sum(piece.words for piece in pieces)
    boundaries = [total]
    for document in others:
        if total > length:
            break
        text = data.documents[document]
        pieces.append(_piece(document, text, 0, len(text)))
        total += pieces[-1].words
        boundaries.append(total)
    return pieces, boundaries, smallest


def _sentences(text: str) -> Iterator[tuple[int, int]]:
    """Spans of the sentences; a line break ends a sentence, so that a title stands alone."""
    for line in re.finditer(r"[^\n]+", text):
        for start, end in nupunkt.sent_spans(line.group()):
            yield line.start() + start, line.start() + end


def _piece(document: int, text: str, start: int, end: int) -> _Piece:
    return _Piece(document, start, end, len(text[start:end].split()))


def _first_words(documents: Sequence[str], pieces: Sequence[_Piece], ends: Sequence[int], words: int) -> dict[int, str]:
    """The text that the first `words` words leave of each document they reach."""
    kept: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for piece, end in zip(pieces, ends, strict=True):
        spare = words - (end - piece.words)
        if spare <= 0:
            break
        kept[piece.document].append((piece.start, _cut(documents[piece.document], piece, spare)))
    texts = {}
    for document, spans in kept.items():
        text = documents[document]
        joined = ""
        before = 0
        for start, stop in sorted(spans):
            # the blank or line break that separated two kept sentences stays
            joined += (text[before:start] if not text[before:start].strip() else " ") + text[start:stop]
            before = stop
        texts[document] = joined.strip()
    return texts


def _cut(text: str, piece: _Piece, words: int) -> int:
    """Where the first `words` words of a piece end."""
    if words >= piece.words:
        return piece.end
    matches = re.finditer(r"\S+", text[piece.start : piece.end])
    return piece.start + next(itertools.islice(matches, words - 1, None)).end()
