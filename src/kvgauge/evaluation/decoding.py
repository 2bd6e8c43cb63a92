"""Prefill, compress, ask, decode greedily: the loop that every measurement goes through."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from kvgauge.models.facts import check_length

PREFILL_CHUNK = 4096  # tokens of one forward pass: longer prompts go chunk by chunk, their activations never pile up


@torch.no_grad()
def prefill(model: PreTrainedModel, ids: Tensor, cache: Cache, chunk: int = PREFILL_CHUNK) -> Tensor:
    """Run `ids` (batch, tokens) through the model into `cache`; the logits of the last token (batch, vocabulary)."""
    logits = None
    for part in ids.split(chunk, dim=1):
        logits = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    assert logits is not None
    return logits


@torch.no_grad()
def greedy(
    model: PreTrainedModel, logits: Tensor, cache: Cache, max_new_tokens: int, stop: Collection[int]
) -> list[int]:
    """Greedy tokens of one sequence.

    Args:
        logits: (1, vocabulary), of the token before the answer.
        cache: holds everything up to and with that token.
        max_new_tokens: the longest answer.
        stop: token ids that end it; not part of the result.
    """
    answer: list[int] = []
    for _ in range(max_new_tokens):
        token = int(logits.argmax(dim=-1))
        if token in stop:
            break
        answer.append(token)
        if len(answer) == max_new_tokens:
            break
        step = torch.tensor([[token]], device=logits.device)
        logits = model(input_ids=step, past_key_values=cache, use_cache=True).logits[:, -1]
    return answer


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The token ids that end an answer: the generation configuration's and the tokenizer's."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    stop = set(configured) if isinstance(configured, (list, tuple)) else {configured}
    return {int(token) for token in {*stop, tokenizer.eos_token_id} if token is not None}


def check_fits(model: PreTrainedModel, prompt_tokens: int, max_new_tokens: int) -> None:
    """Refuse a prompt and answer that exceed the model's positions.

    Raises:
        UserError: they do.
    """
    check_length(model, prompt_tokens + max_new_tokens, f"a prompt with {max_new_tokens} answer tokens,")
