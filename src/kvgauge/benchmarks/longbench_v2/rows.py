"""The official rows of LongBench v2: ``data.json``, and what each of its questions is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvgauge.corpora.official import OfficialFiles, text_of

DATASET, FILE = "THUDM/LongBench-v2", "data.json"
ADVICE = f"get {FILE} of the hub's dataset {DATASET} and set benchmark.source to its directory"
STAND_IN_ADVICE = (
    "make it with python -m kvgauge.benchmarks.longbench_v2.stand_in <directory> and set benchmark.source to that "
    "directory"
)
LETTERS = "ABCD"
DIFFICULTIES = ("easy", "hard")
# The paper's classes of length, with what stands for them where a number is needed: their upper bound in words; the
# last is open above, and its number twice its lower bound.
LENGTHS = {"short": 32_000, "medium": 128_000, "long": 256_000}


@dataclass(frozen=True)
class Row:
    """One question.

    Attributes:
        source_id: the file's own ``_id``.
        domain: one of the paper's six, as a word.
        difficulty: ``easy`` or ``hard``.
        length: ``short``, ``medium`` or ``long``.
        question, context: texts.
        choices: the four answers.
        answer: the letter of the right one.
    """

    source_id: str
    domain: str
    difficulty: str
    length: str
    question: str
    context: str
    choices: tuple[str, str, str, str]
    answer: str

    @property
    def task(self) -> str:
        """Domain and difficulty: the paper averages over both."""
        return f"{self.domain}_{self.difficulty}"


def read(source: str, advice: str = ADVICE) -> list[Row]:
    """The rows of a source, in the file's order.

    Raises:
        UserError: the file is missing, out of reach or damaged, or a row of it is not an official one.
    """
    files = OfficialFiles("LongBench v2", DATASET, source, advice)
    path = files.find([FILE])[FILE]
    rows = []
    for number, row in files.rows(path):
        try:
            rows.append(_row(row))
        except (KeyError, ValueError) as error:
            raise files.bad_row(path, number, error) from error
    return rows


def _row(row: Mapping[str, Any]) -> Row:
    answer, difficulty, length = (text_of(row, key) for key in ("answer", "difficulty", "length"))
    if answer not in LETTERS or difficulty not in DIFFICULTIES or length not in LENGTHS:
        raise ValueError(f"answer {answer!r}, difficulty {difficulty!r}, length {length!r}")
    one, two, three, four = (text_of(row, f"choice_{letter}") for letter in LETTERS)
    return Row(
        source_id=text_of(row, "_id"),
        domain=re.sub(r"\W+", "_", text_of(row, "domain").strip().lower()),
        difficulty=difficulty,
        length=length,
        question=text_of(row, "question"),
        context=text_of(row, "context"),
        choices=(one, two, three, four),
        answer=answer,
    )
