"""A benchmark prompt as the engine reads it from ``samples.jsonl``, whatever benchmark it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvgauge.artifacts import read_lines
from kvgauge.errors import UserError

_REQUIRED = ("id", "task", "context", "question", "answers", "max_new_tokens", "length")


@dataclass(frozen=True)
class Prompt:
    """One prompt and its references.

    Attributes:
        id: unique in its file, e.g. ``<task>-<length>-<index>``.
        task: decides the score.
        context: everything a cache may compress before the question is known: instructions and haystack.
        question: the rest of the user's turn. The turn is ``context + question``, nothing between.
        answer_prefix: the start of the assistant's turn, without surrounding blanks.
        answers: the references.
        max_new_tokens: tokens the answer may take.
        length: the target length in tokens, by which results are grouped.
    """

    id: str
    task: str
    context: str
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    max_new_tokens: int
    length: int


@dataclass(frozen=True)
class Sample(Prompt):
    """A prompt as it was read.

    Attributes:
        chat: use the chat template; None leaves it to the benchmark's configuration.
        facts: what else the benchmark says about the sample, e.g. its language.
    """

    chat: bool | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, row: Mapping[str, Any], where: str = "a sample") -> Sample:
        """The sample of one JSON object.

        Raises:
            UserError: a key is missing.
        """
        missing = [key for key in _REQUIRED if key not in row]
        if missing:
            raise UserError(f"{where} has no {', '.join(missing)}: run `kvgauge prepare` again")
        known = {"answer_prefix", "chat", *_REQUIRED}
        return cls(
            id=row["id"],
            task=row["task"],
            context=row["context"],
            question=row["question"],
            answer_prefix=row.get("answer_prefix", ""),
            answers=tuple(row["answers"]),
            max_new_tokens=int(row["max_new_tokens"]),
            length=int(row["length"]),
            chat=row.get("chat"),
            facts={key: value for key, value in row.items() if key not in known},
        )


def read_samples(directory: Path) -> list[Sample]:
    """The samples of a prompts artifact, in its order.

    Raises:
        UserError: the file is missing, damaged or empty, or two samples have one id.
    """
    path = directory / "samples.jsonl"
    samples = [Sample.of(row, f"line {number} of {path}") for number, row in enumerate(read_lines(path), start=1)]
    if not samples:
        raise UserError(f"{path} has no samples: run `kvgauge prepare` again")
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise UserError(f"{path} has the id {sample.id!r} twice: run `kvgauge prepare` again")
        seen.add(sample.id)
    return samples
