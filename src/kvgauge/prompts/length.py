"""How long a prompt is once a model's chat template stands around it."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from kvgauge.prompts.encoding import Template, encode


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
