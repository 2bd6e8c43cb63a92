"""LongBench v2 as a benchmark: prompt and reading of answers as officially, without reasoning."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvgauge.benchmarks.longbench.truncation import fit
from kvgauge.benchmarks.longbench_v2.rows import ADVICE, DIFFICULTIES, LENGTHS, LETTERS, STAND_IN_ADVICE, Row, read
from kvgauge.contract.benchmark import SETTING, Benchmark, Overlong
from kvgauge.errors import UserError
from kvgauge.prompts.encoding import Template
from kvgauge.prompts.length import TokenCounter
from kvgauge.prompts.samples import Sample

MAX_NEW_TOKENS = 128  # official, for answers without reasoning
HEAD = "Please read the following text and answer the question below.\n\n<text>\n"
_SAID = re.compile(r"The correct answer is (?:\(([A-D])\)|([A-D]))")


@dataclass(frozen=True, kw_only=True)
class LongBenchV2(Benchmark):
    """LongBench v2, or its stand-in.

    Tasks are domain and difficulty; the length of a sample is its class of length (`LENGTHS`).

    Attributes:
        samples: questions in all, drawn with the seed; more of them add to those there are. None for all.
        source: ``hub``, or a directory with ``data.json``.
        max_length: tokens of the assembled prompt and its answer together, at most: the middle of a longer text is
            left out. None leaves prompts whole; evaluation then cuts those that exceed the model's positions.
        stand_in: the rows are those of `kvgauge.benchmarks.longbench_v2.stand_in`: tasks end in ``_stand_in``.
        seed: of the draw.

    Raises:
        UserError: a number below one.
    """

    name: str = "longbench_v2"
    samples: int | None = None
    source: str = "hub"
    max_length: int | None = None
    stand_in: bool = False
    seed: int = 42

    def __post_init__(self) -> None:
        for field in ("samples", "max_length"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise UserError(f"benchmark {self.name}: {field} is {value}: set it to 1 or more, or to null")

    def prompts(self, counter: TokenCounter) -> Iterator[Sample]:
        """The questions, in the file's order; errors as `kvgauge.benchmarks.longbench_v2.rows.read`."""
        rows = read(self.source, STAND_IN_ADVICE if self.stand_in else ADVICE)
        order = random.Random(f"{self.seed}/{self.name}").sample(range(len(rows)), len(rows))
        for index in sorted(order[: self.samples]):
            yield self._sample(counter, rows[index], index)

    def _sample(self, counter: TokenCounter, row: Row, index: int) -> Sample:
        template = Template.of(counter.tokenizer, self.chat)
        limit = None if self.max_length is None else self.max_length - MAX_NEW_TOKENS
        choices = "\n".join(f"({letter}) {text.strip()}" for letter, text in zip(LETTERS, row.choices, strict=True))
        question = (
            f"\n</text>\n\nWhat is the correct answer to this question: {row.question.strip()}\nChoices:\n{choices}\n\n"
            'Format your response as follows: "The correct answer is (insert answer here)".'
        )
        fitted = fit(counter.tokenizer, template, HEAD + row.context.strip(), question, limit)
        return Sample(
            id=f"{row.task}-{index:04d}",
            task=row.task + ("_stand_in" if self.stand_in else ""),
            context=fitted.context,
            question=fitted.question,
            answers=(row.answer,),
            max_new_tokens=MAX_NEW_TOKENS,
            length=LENGTHS[row.length],
            tokens=fitted.tokens + MAX_NEW_TOKENS,
            facts={
                "source_id": row.source_id,
                "length_class": row.length,
                "difficulty": row.difficulty,
                "truncated": fitted.truncated,
            },
        )

    def score(self, sample: Sample, answer: str) -> float:
        """1 where the answer names the right letter in the words that were asked for, in brackets or without."""
        return float(said(answer) == sample.answers[0])

    @property
    def overlong(self) -> Overlong:
        """The middle of a long text is left out, as the official script does."""
        return "truncate"

    def kind(self, task: str) -> str:
        """Question answering, all of it."""
        return "qa"

    def averages(self, cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The columns of the paper's table: all questions, easy and hard ones, short, medium and long ones.

        Each is the share of right answers, so that a question weighs the same whatever its domain.
        """
        return [row for setting, tasks in _by_setting(cells) for row in _columns(setting, tasks)]


def said(answer: str) -> str | None:
    """The letter that an answer names; None where it names none."""
    found = _SAID.search(answer.replace("*", ""))
    return None if found is None else found.group(1) or found.group(2)


Means = list[tuple[str, int, int, float]]  # task, length, samples, mean


def _by_setting(cells: Sequence[Mapping[str, Any]]) -> Iterator[tuple[dict[str, Any], Means]]:
    """Every cell, with its tasks at each class of length."""
    found: dict[tuple[Any, ...], Means] = {}
    keys = [key for key in SETTING if key != "length"]
    for row in cells:
        if row["task"] != "all" and row["length"] is not None:
            means = found.setdefault(tuple(row[key] for key in keys), [])
            means.append((row["task"], row["length"], row["n"], row["mean"]))
    for setting, means in found.items():
        yield dict(zip(keys, setting, strict=True)) | {"length": None}, means


def _columns(setting: dict[str, Any], means: Means) -> Iterator[dict[str, Any]]:
    columns: dict[str, Means] = {"overall": means}
    for difficulty in DIFFICULTIES:
        columns[difficulty] = [row for row in means if difficulty in row[0].removesuffix("_stand_in").rsplit("_", 1)]
    for name, length in LENGTHS.items():
        columns[name] = [row for row in means if row[1] == length]
    for average, rows in columns.items():
        questions = sum(count for _, _, count, _ in rows)
        if questions:
            mean = sum(count * mean for _, _, count, mean in rows) / questions
            yield setting | {"average": average, "mean": mean, "tasks": sorted({row[0] for row in rows})}
