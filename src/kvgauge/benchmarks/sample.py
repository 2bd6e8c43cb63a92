"""A benchmark prompt, and how the length of one is measured."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol


class PromptLength(Protocol):
    """How many tokens a prompt has once it is assembled."""

    def __call__(self, context: str, question: str, answer_prefix: str) -> int:
        """Tokens of `context` and `question` in the user's turn and `answer_prefix` in the assistant's.

        The chat template, its system prompt and its special tokens count too.
        """
        ...


@dataclass(frozen=True)
class Sample:
    """One prompt of a benchmark, as the prepare stage writes it.

    Attributes:
        id: unique name, e.g. ``<task>-<length>-<index>``.
        task: one of the benchmark's tasks.
        context: everything a cache may compress before the question is known: instructions and haystack.
        question: the rest of the user's turn. The turn is ``context + question``, nothing between.
        answer_prefix: the start of the assistant's turn, without surrounding blanks.
        answers: the references.
        max_new_tokens: tokens the answer may take.
        length: the target, in tokens.
        tokens: tokens of the assembled prompt plus `max_new_tokens`; at most `length`.
    """

    id: str
    task: str
    context: str
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    max_new_tokens: int
    length: int
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """The sample as a JSON object."""
        return dataclasses.asdict(self) | {"answers": list(self.answers)}
