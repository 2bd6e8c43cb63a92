"""Greedy decoding with drafts: the answers of other cells to the same prompt, and the prompt itself.

Cells of a panel answer the same prompt, and many of their answers agree, or copy the same words out of the context. A
draft is checked in one forward pass, which reads weights and cache once for all of its tokens; the first token that the
model would not have chosen ends it. What is left is the greedy answer (speculative decoding, arXiv 2211.17192, with
prompt look-up in the place of a draft model), up to the order in which floating-point sums are made.

The cache must be able to forget the tokens that were not chosen; `KVCache.reversible_tokens` says how many. Caches that
merge, evict or fold as they go can forget none, and decode token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgauge.layers.cache import KVCache

NGRAMS = (4, 3, 2)  # tokens of the answer's end that are looked up, the surest first


@dataclass
class Drafts:
    """Where drafts for one prompt come from.

    Attributes:
        tokens: the most that one forward pass checks.
        prompt: token ids of context and question.
        answers: token ids of answers that other cells have given, or of other turns.
    """

    tokens: int
    prompt: Sequence[int] = ()
    answers: list[list[int]] = field(default_factory=list)

    def propose(self, answer: Sequence[int], most: int) -> list[int]:
        """What may follow `answer`, at most `most` tokens: the rest of an answer that begins alike, or what followed
        the last few tokens elsewhere; the latest answer before the others, and the prompt last."""
        most = min(most, self.tokens)
        if most <= 0:
            return []
        begun = list(answer)
        for known in reversed(self.answers):
            if known[: len(begun)] == begun and len(known) > len(begun):
                return known[len(begun) : len(begun) + most]
        for size in NGRAMS:
            if len(begun) < size:
                continue
            for source in (begun, *reversed(self.answers), self.prompt):
                place = _last(source, begun[-size:])
                if place is not None:
                    return list(source[place : place + most])
        return []


def _last(source: Sequence[int], wanted: list[int]) -> int | None:
    """The index behind the last place where `source` holds `wanted` and something follows."""
    size, first = len(wanted), wanted[0]
    for start in range(len(source) - size - 1, -1, -1):
        if source[start] == first and list(source[start : start + size]) == wanted:
            return start + size
    return None


@torch.no_grad()
def greedy_drafted(
    model: PreTrainedModel,
    logits: Tensor,
    cache: KVCache,
    max_new_tokens: int,
    stop: Collection[int],
    drafts: Drafts,
    ended: Callable[[Sequence[int]], bool] | None = None,
    watch: Callable[[], None] = lambda: None,
) -> list[int]:
    """Greedy tokens of one sequence; arguments, result and the state of the cache as `decoding.greedy` has them.

    Args:
        model: loaded by `kvgauge.load_model`.
        logits: (1, vocabulary), of the token before the answer.
        cache: holds everything up to and with that token, and is compressed.
        max_new_tokens: the longest answer.
        stop: token ids that end it; not part of the result.
        drafts: for this prompt.
        ended: whether the tokens of an answer end it.
        watch: called after every forward pass, when what was not chosen is forgotten.
    """
    answer: list[int] = []
    chosen = logits.argmax(dim=-1)
    while len(answer) < max_new_tokens and int(chosen) not in stop:
        answer.append(int(chosen))
        if len(answer) == max_new_tokens or (ended and ended(answer)):
            break
        # The answer's last token is never run through the model.
        most = min(max_new_tokens - len(answer), cache.reversible_tokens()) - 1
        draft = drafts.propose(answer, most)
        fed = torch.tensor([[answer[-1], *draft]], device=model.device)
        choices = model(input_ids=fed, past_key_values=cache, use_cache=True).logits[0].argmax(dim=-1).tolist()
        kept, over = 0, False
        while kept < len(draft) and draft[kept] == choices[kept] and draft[kept] not in stop and not over:
            kept += 1
            over = ended is not None and ended([*answer, *draft[:kept]])
        run = kept - over  # the answer's last token counts as never run
        if run < len(draft):
            cache.crop(run - len(draft))
        watch()
        answer += draft[:kept]
        if over:
            break
        chosen = torch.tensor([choices[kept]])
    return answer
