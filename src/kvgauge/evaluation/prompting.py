"""From a sample's texts to the token ids of its context and of the rest of its prompt.

The two are tokenised apart, so that the context's tokens do not depend on the question: what a prefix cache needs, and
what lets one prefill serve every question.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_MARK = "\u241e"  # stands for the user's text while the chat template is split around it


@dataclass(frozen=True)
class Template:
    """What a chat template puts around a user's text.

    Attributes:
        before: everything up to the user's text, begin-of-sequence token included.
        after: everything between the user's text and the assistant's answer.
    """

    before: str
    after: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, chat: bool | None = None) -> Template:
        """The template of a tokenizer.

        Args:
            tokenizer: of the model.
            chat: True for the chat template, False for plain text behind the begin-of-sequence token, None for the
                chat template where there is one.
        """
        if chat is None:
            chat = tokenizer.chat_template is not None
        if not chat or tokenizer.chat_template is None:
            adds_bos = bool(tokenizer.bos_token) and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
            return cls(tokenizer.bos_token if adds_bos else "", "")
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
        )
        before, _, after = str(text).partition(_MARK)
        return cls(before, after)


@dataclass(frozen=True)
class Prompt:
    """Token ids of one prompt: `context` (1, tokens) may be compressed before `question` (1, tokens) is seen."""

    context: Tensor
    question: Tensor

    @property
    def tokens(self) -> int:
        return self.context.shape[1] + self.question.shape[1]


def encode(
    tokenizer: PreTrainedTokenizerBase, template: Template, context: str, question: str, answer_prefix: str = ""
) -> Prompt:
    """The prompt of a sample: the user turn is context and question, the assistant's answer starts with the prefix."""
    before = tokenizer(template.before + context, add_special_tokens=False).input_ids
    after = tokenizer(question + template.after + answer_prefix, add_special_tokens=False).input_ids
    return Prompt(torch.tensor([before]), torch.tensor([after]))
