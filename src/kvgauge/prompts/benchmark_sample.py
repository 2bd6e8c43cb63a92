"""A benchmark prompt, and how the length of one is measured."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

from kvgauge.prompts.samples import Prompt


class PromptLength(Protocol):
    """How many tokens a prompt has once it is assembled."""

    def __call__(self, context: str, question: str, answer_prefix: str) -> int:
        """Tokens of `context` and `question` in the user's turn and `answer_prefix` in the assistant's.

        The chat template, its system prompt and its special tokens count too.
        """
        ...


@dataclass(frozen=True)
class Sample(Prompt):
    """One prompt of a benchmark, as the prepare stage writes it.

    Attributes:
        tokens: tokens of the assembled prompt plus `max_new_tokens`; at most `length`.
    """

    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """The sample as a JSON object."""
        return dataclasses.asdict(self) | {"answers": list(self.answers)}
