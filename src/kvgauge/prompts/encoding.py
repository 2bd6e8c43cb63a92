"""From a sample's texts to the token ids of its context and of the rest of its prompt.

The two are tokenised apart, so that the context's tokens do not depend on the question: what a prefix cache needs, and
what lets one prefill serve every question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvgauge.errors import UserError
from kvgauge.prompts.samples import Choice

_MARK = "\u241e"  # stands for the user's text while the chat template is split around it


@dataclass(frozen=True)
class Template:
    """What a chat template puts around a user's text.

    Attributes:
        before: everything up to the user's text, begin-of-sequence token included.
        after: everything between the user's text and the assistant's answer.
        between: everything between the assistant's answer and the user's next text.
    """

    before: str
    after: str
    between: str = "\n\n"

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
        user = {"role": "user", "content": _MARK}
        text = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        before, _, after = str(text).partition(_MARK)
        turns = [user, {"role": "assistant", "content": _MARK}, user]
        talk = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        parts = str(talk).split(_MARK)
        # A template that leaves earlier turns out says nothing about what stands between them.
        return cls(before, after, parts[2]) if len(parts) == 4 else cls(before, after)


@dataclass(frozen=True)
class Prompt:
    """Token ids of one prompt: `context` (1, tokens) may be compressed before `question` (1, tokens) is seen."""

    context: Tensor
    question: Tensor

    @property
    def tokens(self) -> int:
        return self.context.shape[1] + self.question.shape[1]

    def without_middle(self, tokens: int) -> Prompt:
        """The prompt with `tokens` tokens cut out of the middle of its context (LongBench, arXiv 2308.14508)."""
        kept = self.context.shape[1] - tokens
        head, tail = kept // 2, kept - kept // 2
        return Prompt(torch.cat([self.context[:, :head], self.context[:, -tail:]], dim=1), self.question)


def encode(
    tokenizer: PreTrainedTokenizerBase, template: Template, context: str, question: str, answer_prefix: str = ""
) -> Prompt:
    """The prompt of a sample: the user turn is context and question, the assistant's answer starts with the prefix.

    Context and question are joined as they are: benchmarks say what stands between them. In plain text a blank stands
    between a question and the answer's prefix, as in RULER's prompts (arXiv 2404.06654).

    Neither part is ever empty: where one would be, it gets a token of the other.

    Raises:
        UserError: there is no text at all.
    """
    before = tokenizer(template.before + context, add_special_tokens=False).input_ids
    after = tokenizer(_asked(template, question, answer_prefix), add_special_tokens=False).input_ids
    if len(before) + len(after) < 2:
        raise UserError("a prompt of less than two tokens cannot be split into context and question: give more text")
    if not after:
        before, after = before[:-1], before[-1:]
    if not before:
        before, after = after[:1], after[1:]
    return Prompt(torch.tensor([before]), torch.tensor([after]))


def _asked(template: Template, question: str, answer_prefix: str) -> str:
    """A question, what the template puts behind it, and the start of the answer."""
    text = question + template.after
    if text and answer_prefix and not text[-1].isspace() and not answer_prefix[0].isspace() and not template.after:
        text += " "
    return text + answer_prefix


def encode_follow_up(
    tokenizer: PreTrainedTokenizerBase, template: Template, question: str, answer_prefix: str = ""
) -> Tensor:
    """Token ids (1, tokens) of a further question, from the end of the answer before it."""
    text = template.between + _asked(template, question, answer_prefix)
    return torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])


@dataclass(frozen=True)
class EncodedChoice:
    """Token ids of a choice: `rest` (tokens,) is read behind the question, `text` (tokens,) is scored behind it."""

    rest: Sequence[int]
    text: Sequence[int]


def encode_choices(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    question: str,
    answer_prefix: str,
    choices: Sequence[Choice],
) -> list[EncodedChoice]:
    """The choices of a sample, tokenised together with what stands before them, as lm-eval does: a text gets the tokens
    that the prompt has more with it than without it.

    Raises:
        UserError: a choice without a token.
    """
    asked = _asked(template, question, answer_prefix)
    shared = len(tokenizer(asked, add_special_tokens=False).input_ids)
    encoded = []
    for choice in choices:
        before = tokenizer(asked + choice.rest, add_special_tokens=False).input_ids
        whole = tokenizer(asked + choice.rest + choice.text, add_special_tokens=False).input_ids
        if len(whole) <= len(before):
            raise UserError(f"the choice {choice.text!r} adds no token to its prompt: there is nothing to score")
        encoded.append(EncodedChoice(before[shared:], whole[len(before) :]))
    return encoded


@dataclass(frozen=True)
class Batch:
    """Prompts that are run together, left-padded: contexts to one width, and behind them questions to another.

    Attributes:
        context: (batch, context width).
        question: (batch, question width), the first question of each sequence.
        context_mask: (batch, context width), False on padding; None where no sequence is padded.
        prompt_mask: (batch, context width + question width), likewise.
        max_new_tokens: for each turn the longest answer of each sequence.
        follow_ups: the questions of further turns, each (1, tokens); only for a batch of one.
        stop: for each sequence the texts that end its answer.
        choices: to be scored in the place of an answer; only for a batch of one.
        names: for each sequence the id of its sample, the first one of a conversation.
    """

    context: Tensor
    question: Tensor
    context_mask: Tensor | None
    prompt_mask: Tensor | None
    max_new_tokens: Sequence[Sequence[int]]
    follow_ups: Sequence[Tensor] = field(default_factory=tuple)
    stop: Sequence[Sequence[str]] = field(default_factory=tuple)
    choices: Sequence[EncodedChoice] = field(default_factory=tuple)
    names: Sequence[str] = field(default_factory=tuple)

    @property
    def size(self) -> int:
        return self.context.shape[0]

    def width(self, upto: str) -> int:
        """Tokens of every sequence, padding included, up to the end of the ``context`` or of the ``prompt``."""
        return self.context.shape[1] + (self.question.shape[1] if upto == "prompt" else 0)

    def padding(self, upto: str) -> list[int]:
        """Padding tokens of each sequence up to the end of the ``context`` or of the ``prompt``."""
        mask = self.context_mask if upto == "context" else self.prompt_mask
        return [0] * self.size if mask is None else (~mask).sum(dim=1).tolist()


def batch_of(prompts: Sequence[Prompt], max_new_tokens: Sequence[int], pad: int) -> Batch:
    """Pad prompts to one batch.

    Args:
        prompts: at least one.
        max_new_tokens: of each.
        pad: the token that fills up.
    """
    context, context_mask = _left_padded([prompt.context[0] for prompt in prompts], pad)
    question, question_mask = _left_padded([prompt.question[0] for prompt in prompts], pad)
    prompt_mask = torch.cat([context_mask, question_mask], dim=1)
    return Batch(
        context,
        question,
        None if bool(context_mask.all()) else context_mask,
        None if bool(prompt_mask.all()) else prompt_mask,
        [list(max_new_tokens)],
    )


def _left_padded(rows: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = row
        mask[index, width - len(row) :] = True
    return ids, mask
