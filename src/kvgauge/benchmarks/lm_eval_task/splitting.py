"""Where a prompt's context ends: at a token that both parts keep when they are tokenised apart.

lm-eval hands over whole texts. A benchmark's context and question are tokenised apart, so a cut may only stand where
the tokens of the parts are those of the whole: else the model would read another prompt than under lm-eval's loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

from transformers import PreTrainedTokenizerBase

from kvgauge.errors import UserError

ATTEMPTS = 32  # places that are tried, the nearest first


@dataclass(frozen=True)
class Split:
    """A prompt in two parts.

    Attributes:
        context: may be compressed before the rest is read.
        question: what follows in every request of the document.
        rests: for each request what follows the question before the text that is scored.
        exact: the tokens of the parts are those of the whole.
    """

    context: str
    question: str
    rests: tuple[str, ...]
    exact: bool


def split(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    texts: Sequence[str],
    tail: int,
    context_end: int | None = None,
) -> Split:
    """Cut the prompts of a document.

    Args:
        tokenizer: of the model, with a fast backend.
        prompts: of the document's requests; one where a text is generated. What they begin with together is cut.
        texts: for each request what is scored behind it; empty where a text is generated.
        tail: tokens that the question has at least, where `context_end` is None.
        context_end: characters of the context that the task names; the cut is at the next token that can be cut at.

    Raises:
        UserError: prompts without a common token, or a tokenizer that does not know where its tokens stand in a text.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} has no fast backend, which telling a context from its question needs: "
            f"convert the tokenizer"
        )
    shared = reduce(beginning, prompts)
    spans = tokenizer(shared, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    starts = [start for start, end in spans if end > start]
    alike = all(prompt == shared for prompt in prompts)
    first: Split | None = None
    for cut, end in _places(starts, len(shared), alike, tail, context_end):
        parts = Split(shared[:cut], shared[cut:end], tuple(prompt[end:] for prompt in prompts), True)
        if _exact(tokenizer, parts, prompts, texts):
            return parts
        first = first or parts
    if first is None:
        raise UserError("the requests of a document share no context: there is nothing to compress, take another task")
    return Split(first.context, first.question, first.rests, False)


def beginning(text: str, other: str) -> str:
    """What two texts begin with."""
    pairs = enumerate(zip(text, other, strict=False))
    return text[: next((place for place, (one, two) in pairs if one != two), min(len(text), len(other)))]


def _places(
    starts: Sequence[int], length: int, alike: bool, tail: int, context_end: int | None
) -> Iterator[tuple[int, int]]:
    """Ends of context and of question, in characters, the best first."""
    if not alike:  # the question ends where the requests part, at the latest
        for back in range(1, min(ATTEMPTS, len(starts) - tail) + 1):
            yield starts[-back - tail], starts[-back]
        return
    if context_end is not None:
        behind = [start for start in starts if start >= context_end][:ATTEMPTS]
        before = [start for start in reversed(starts) if 0 < start < context_end][:ATTEMPTS]
        yield from ((start, length) for start in (*behind, *before))
        return
    kept = len(starts) - min(tail, max(len(starts) - 1, 1))
    for index in range(kept, max(kept - ATTEMPTS, -1), -1):
        if index < len(starts):
            yield starts[index], length


def _exact(tokenizer: PreTrainedTokenizerBase, parts: Split, prompts: Sequence[str], texts: Sequence[str]) -> bool:
    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    context, question = ids(parts.context), ids(parts.question)
    for number, (prompt, rest) in enumerate(zip(prompts, parts.rests, strict=True)):
        whole, behind = ids(prompt), ids(parts.question + rest)
        if context + behind != whole or behind[: len(question)] != question:
            return False
        if texts:
            more = ids(parts.question + rest + texts[number])
            if more[len(behind) :] != ids(prompt + texts[number])[len(whole) :]:
                return False
    return True
