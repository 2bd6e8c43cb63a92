"""`kvgauge.generate`: one answer from a compressed cache, in one call."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvgauge.contract.fitted import Fitted
from kvgauge.contract.method import Method
from kvgauge.evaluation.decoding import check_fits, greedy, prefill, stop_tokens
from kvgauge.prompts.encoding import Template, encode


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
    """The greedy answer to `question` about `context`, with the context in a compressed cache.

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
        UserError: the prompt is longer than the model's positions, or `fitted` does not belong to model and method.
    """
    prompt = encode(tokenizer, Template.of(tokenizer, chat), context, question, answer_prefix)
    check_fits(model, prompt.tokens, max_new_tokens)
    cache = method.new_cache(model, fitted)
    prefill(model, prompt.context.to(model.device), cache)
    if compress_at == "context":
        cache.compress()
    logits = prefill(model, prompt.question.to(model.device), cache)
    if compress_at == "prompt":
        cache.compress()
    answer = greedy(model, logits, cache, max_new_tokens, stop_tokens(model, tokenizer))
    return str(tokenizer.decode(answer, skip_special_tokens=True)).strip()
