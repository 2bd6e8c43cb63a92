"""Middle truncation: the first and the last half of what a prompt may have (arXiv 2308.14508)."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from kvgauge.errors import UserError
from kvgauge.prompts.encoding import Template, encode


@dataclass(frozen=True)
class Fitted:
    """A prompt that fits.

    Attributes:
        context: what is left of the context.
        question: what is left of the question: all of it unless it is longer than half of what fits.
        tokens: tokens of the assembled prompt, chat template included.
        whole_tokens: the same before anything was left out.
    """

    context: str
    question: str
    tokens: int
    whole_tokens: int

    @property
    def truncated(self) -> bool:
        """Whether anything was left out."""
        return self.tokens < self.whole_tokens


def fit(
    tokenizer: PreTrainedTokenizerBase, template: Template, context: str, question: str, limit: int | None
) -> Fitted:
    """The prompt with its middle left out as far as it must be.

    The official script cuts the text of the whole prompt, question included, and puts the chat template around it
    afterwards; so does this, but the template counts here, where the script trusts in a margin of some hundred tokens.

    Args:
        tokenizer: of the model, with a fast backend.
        template: its chat template, or the empty one.
        context: the prompt up to the end of the context.
        question: the rest of it.
        limit: most tokens of the assembled prompt; None for any number.

    Raises:
        UserError: the limit leaves no room beside the template, or the tokenizer does not know where its tokens stand
            in a text.
    """

    def measure(context: str, question: str) -> int:
        return encode(tokenizer, template, context, question).tokens

    whole = tokens = measure(context, question)
    if limit is None or whole <= limit:
        return Fitted(context, question, whole, whole)
    # The two parts are tokenised apart, so a cut text can have a token or two more than it was cut to: cut again.
    keep = limit - _template_tokens(tokenizer, template)
    kept = (context, question)
    while tokens > limit:
        if keep < 2:
            raise UserError(
                f"a prompt of {limit} tokens leaves no room for a text inside the chat template: "
                "set benchmark.max_length higher"
            )
        kept = cut_middle(tokenizer, context, question, keep)
        tokens = measure(*kept)
        keep -= max(tokens - limit, 1)
    return Fitted(*kept, tokens, whole)


def cut_middle(tokenizer: PreTrainedTokenizerBase, context: str, question: str, keep: int) -> tuple[str, str]:
    """Context and question without the middle of the text they make together.

    Args:
        tokenizer: of the model, with a fast backend.
        context: a text.
        question: the text that follows it without anything between.
        keep: tokens to keep, half of them at either end; of an odd number the last one is given up.

    Raises:
        UserError: the tokenizer does not know where its tokens stand in a text.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} has no fast backend, which cutting a text to a number of tokens needs: "
            "convert the tokenizer, or set benchmark.max_length to null"
        )
    text = context + question
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    half = keep // 2
    if len(spans) <= keep:
        return context, question
    head_end = spans[half - 1][1]
    # A character of several tokens, right at the cut, belongs to both ends.
    tail_start = max(spans[-half][0], head_end)
    edge = len(context)
    return (
        text[: min(head_end, edge)] + text[min(tail_start, edge) : edge],
        text[edge : max(head_end, edge)] + text[max(tail_start, edge) :],
    )


def _template_tokens(tokenizer: PreTrainedTokenizerBase, template: Template) -> int:
    return sum(
        len(tokenizer(part, add_special_tokens=False).input_ids) for part in (template.before, template.after) if part
    )
