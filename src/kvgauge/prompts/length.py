"""How long a prompt is once a model's chat template stands around it."""

from __future__ import annotations

from typing import Protocol

from transformers import PreTrainedTokenizerBase

from kvgauge.prompts.encoding import Template, encode


class PromptLength(Protocol):
    """How many tokens a prompt has once it is assembled."""

    def __call__(self, context: str, question: str, answer_prefix: str) -> int:
        """Tokens of `context` and `question` in the user's turn and `answer_prefix` in the assistant's.

        The chat template, its system prompt and its special tokens count too.
        """
        ...


class TokenCounter:
    """Tokens of an assembled prompt, exactly as `kvgauge.prompts.encoding.encode` tokenises it.

    Args:
        tokenizer: of the model.
        chat: use its chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> None:
        self.tokenizer = tokenizer
        self.template = Template.of(tokenizer, chat)

    def __call__(self, context: str, question: str, answer_prefix: str) -> int:
        return encode(self.tokenizer, self.template, context, question, answer_prefix).tokens
