"""A benchmark prompt: as a benchmark makes it, as ``samples.jsonl`` holds it, and as the engine reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvgauge.artifacts import read_lines
from kvgauge.errors import UserError

_REQUIRED = ("id", "task", "context", "question", "answers", "max_new_tokens", "length")
_KNOWN = {*_REQUIRED, "answer_prefix", "tokens", "chat", "stop", "choices"}


@dataclass(frozen=True)
class Choice:
    """A text whose log-probability behind a prompt is asked for.

    Attributes:
        text: it.
        rest: what stands between the question and the text, where choices differ in that.
    """

    text: str
    rest: str = ""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt and its references.

    Attributes:
        id: unique in its file, e.g. ``<task>-<length>-<index>``.
        task: by which results are told apart.
        context: everything a cache may compress before the question is known: instructions and haystack.
        question: the rest of the user's turn. The turn is ``context + question``, nothing between.
        answer_prefix: the start of the assistant's turn, without surrounding blanks.
        answers: the references.
        max_new_tokens: tokens the answer may take.
        length: the target length in tokens, by which results are grouped.
        tokens: of the assembled prompt plus `max_new_tokens`; None where the benchmark does not count them.
        chat: use the chat template; None leaves it to the benchmark's configuration.
        stop: texts that end an answer, besides the model's own end; a score has to cut the answer before them.
        choices: where there are any, nothing is generated: the answer is their log-probabilities, as
            `kvgauge.prompts.choices` writes and reads them, and `max_new_tokens` the length of the longest.
        facts: what else the benchmark says about the sample, as JSON-like data: what its score needs, or
            ``truncated``, True where the benchmark itself left a part of the context out.
    """

    id: str
    task: str
    context: str
    question: str
    answer_prefix: str = ""
    answers: tuple[str, ...]
    max_new_tokens: int
    length: int
    tokens: int | None = None
    chat: bool | None = None
    stop: tuple[str, ...] = ()
    choices: tuple[Choice, ...] = ()
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
        return cls(
            id=row["id"],
            task=row["task"],
            context=row["context"],
            question=row["question"],
            answer_prefix=row.get("answer_prefix", ""),
            answers=tuple(row["answers"]),
            max_new_tokens=int(row["max_new_tokens"]),
            length=int(row["length"]),
            tokens=row.get("tokens"),
            chat=row.get("chat"),
            stop=tuple(row.get("stop", ())),
            choices=tuple(Choice(*choice) for choice in row.get("choices", ())),
            facts={key: value for key, value in row.items() if key not in _KNOWN},
        )

    def to_dict(self) -> dict[str, Any]:
        """The sample as one JSON object, which `of` reads; what is None is left out.

        Raises:
            UserError: a fact has the name of an attribute.
        """
        taken = sorted(_KNOWN & self.facts.keys())
        if taken:
            raise UserError(f"sample {self.id} has a fact called {taken[0]}, as every sample has: call it otherwise")
        row: dict[str, Any] = {
            "id": self.id,
            "task": self.task,
            "context": self.context,
            "question": self.question,
            "answer_prefix": self.answer_prefix,
            "answers": list(self.answers),
            "max_new_tokens": self.max_new_tokens,
            "length": self.length,
        }
        choices = [[choice.text, choice.rest] for choice in self.choices]
        said = {"tokens": self.tokens, "chat": self.chat, "stop": list(self.stop) or None, "choices": choices or None}
        return row | {key: value for key, value in said.items() if value is not None} | dict(self.facts)


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
