"""Prefill and greedy decoding: the two loops that every measurement goes through."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from kvgauge.architecture.facts import check_length
from kvgauge.layers.cache import KVCache

PREFILL_CHUNK = 4096  # tokens of one forward pass: longer prompts go chunk by chunk, their activations never pile up


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    ids: Tensor,
    cache: Cache,
    chunk: int = PREFILL_CHUNK,
    mask: Tensor | None = None,
    *,
    beyond_positions: bool = False,
) -> Tensor:
    """Run `ids` through the model into `cache`; a pass ends where the cache is to be compressed while decoding.

    Args:
        model: loaded by `kvgauge.load_model`.
        ids: (batch, tokens), on the model's device.
        cache: holds everything before `ids`.
        chunk: tokens of one forward pass.
        mask: (batch, cached + tokens), False on padding; None where nothing is padded.
        beyond_positions: more tokens than the model has positions are no mistake: only time and bytes matter.

    Returns:
        The logits of the last token (batch, vocabulary).

    Raises:
        UserError: a sequence is longer than the model's positions.
    """
    logits, total = None, cache.get_seq_length()
    if not beyond_positions:
        upto = total + ids.shape[1]
        check_length(model, upto if mask is None else int(mask[:, :upto].sum(dim=1).max()), "a prompt")
    if isinstance(cache, KVCache):
        if not cache.compressed:
            upto = total + ids.shape[1]
            cache.expect(upto, None if mask is None else (~mask[:, :upto]).sum(dim=1).tolist())
        driven = cache.drive(model, ids, mask)
        if driven is not None:
            return driven
    begin = 0
    while begin < ids.shape[1]:
        room = cache.uncompressed_room() if isinstance(cache, KVCache) else None
        part = ids[:, begin : begin + (chunk if room is None else min(chunk, room))]
        begin += part.shape[1]
        total += part.shape[1]
        extra = padding_arguments(mask, total, part.shape[1])
        logits = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1, **extra).logits[:, -1]
    if logits is None:
        raise ValueError("there are no tokens to prefill")
    return logits


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
    return greedy_batch(model, logits, cache, [max_new_tokens], stop)[0]


@torch.no_grad()
def greedy_batch(
    model: PreTrainedModel,
    logits: Tensor,
    cache: Cache,
    max_new_tokens: Sequence[int],
    stop: Collection[int],
    mask: Tensor | None = None,
    ends: Sequence[Callable[[Sequence[int]], bool]] = (),
    choose: Callable[[Tensor], Tensor] | None = None,
    watch: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Tokens of every sequence of a batch, greedy ones unless they are chosen otherwise.

    The token that ends an answer, or that fills it up, is not run through the model: the cache then ends before it.

    Args:
        model: loaded by `kvgauge.load_model`.
        logits: (batch, vocabulary), of the token before the answers.
        cache: holds everything up to and with that token.
        max_new_tokens: the longest answer of each sequence.
        stop: token ids that end an answer; not part of the result.
        mask: (batch, cached tokens), False on padding; None where nothing is padded.
        ends: for each sequence whether the tokens of its answer end it; nothing ends it where there are none.
        choose: the next token of each sequence (batch,) from logits (batch, vocabulary); None takes the likeliest.
        watch: called after every forward pass.
    """
    answers: list[list[int]] = [[] for _ in max_new_tokens]
    going = [limit > 0 for limit in max_new_tokens]
    while True:
        tokens = logits.argmax(dim=-1) if choose is None else choose(logits)
        for row, token in enumerate(tokens.tolist()):
            if not going[row]:
                continue
            if token in stop:
                going[row] = False
                continue
            answers[row].append(token)
            going[row] = len(answers[row]) < max_new_tokens[row] and not (ends and ends[row](answers[row]))
        if not any(going):
            return answers
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(answers), 1)], dim=1)
        extra = padding_arguments(mask, cache.get_seq_length() + 1, 1)
        # A sequence that has ended goes on with the others; nothing of it is kept.
        logits = model(input_ids=tokens[:, None], past_key_values=cache, use_cache=True, **extra).logits[:, -1]
        watch()


def padding_arguments(mask: Tensor | None, total: int, queries: int) -> dict[str, Tensor]:
    """What the model needs to know where rows are padded: who sees whom, and positions that do not count padding.

    Args:
        mask: (batch, total or more), False on padding; None where nothing is padded.
        total: tokens that are cached, and those that come.
        queries: tokens that come.
    """
    if mask is None:
        return {}
    seen = mask[:, :total]
    positions = (seen.cumsum(dim=1) - 1).clamp(min=0)[:, -queries:]
    return {"attention_mask": seen, "position_ids": positions}


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
