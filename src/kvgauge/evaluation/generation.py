"""`kvgauge.generate`: one answer from a compressed cache, in one call."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvgauge.contract.fitted import Fitted
from kvgauge.contract.method import Method
from kvgauge.evaluation.answering import Answerer
from kvgauge.evaluation.cell import Cell, moment
from kvgauge.evaluation.decoding import check_fits
from kvgauge.prompts.encoding import Template, batch_of, encode


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: str,
    question: str,
    method: Method,
    *,
    fitted: Fitted | None = None,
    max_new_tokens: int = 32,
    compress_at: str = "context",
    answer_prefix: str = "",
    chat: bool | None = None,
) -> str:
    """The greedy answer to `question` about `context`, with the context in a compressed cache: what `evaluate` answers.

    Args:
        model, tokenizer: from `kvgauge.load_model`.
        context: what is compressed.
        question: asked after the compression (``compress_at="context"``) or before it (``"prompt"``).
        method: from `kvgauge.build_method`.
        fitted: what ``method.fit`` returned.
        max_new_tokens: the longest answer.
        compress_at: ``context`` or ``prompt``.
        answer_prefix: the start of the assistant's answer.
        chat: use the chat template; None uses it where the tokenizer has one.

    Raises:
        UserError: another word for `compress_at`, a prompt longer than the model's positions, or a `fitted` that does
            not belong to model and method.
        RuntimeError: the method claims a budget below 1 and did not compress.
    """
    cell = Cell(method, moment(compress_at), fitted)
    prompt = encode(tokenizer, Template.of(tokenizer, chat), context, question, answer_prefix)
    check_fits(model, prompt.tokens, max_new_tokens)
    batch = batch_of([prompt], [max_new_tokens], pad=0)  # one sequence: nothing is padded
    [[answer]] = Answerer(model, tokenizer).answer(cell, batch, None)
    return answer.text.strip()
