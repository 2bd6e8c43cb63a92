"""Answers to prompts whose rotary frequencies depend on their length: which are right, and which are refused."""

from __future__ import annotations

from transformers import PreTrainedModel

from kvgauge.architecture.prompt_length import length_changes, length_dependent
from kvgauge.errors import UserError
from kvgauge.layers.cache import KVCache


def check_frequencies(
    name: str, model: PreTrainedModel, cache: KVCache, tokens: int, longest: int, *, padded: bool = False
) -> None:
    """Refuse what follows a prompt where it is turned by other frequencies than the prompt, and that is not right.

    With ``dynamic`` frequencies transformers turns every further token by its own; what is cached stays as it is. With
    ``longrope`` there are two sets: a model that passes from one to the other reads all of its prompt again, which no
    compressed cache can do.

    Args:
        name: of the cell.
        model: any decoder.
        cache: that answers.
        tokens: of the prompt.
        longest: with all that may follow it.
        padded: there are other prompts beside it, of other lengths.

    Raises:
        UserError: several lengths at once, a prompt and an answer on two sides of longrope's change, or a cache that
            moves keys behind a prompt whose frequencies are not those of the answer.
    """
    kind = length_dependent(model)
    if kind is None:
        return
    if padded:
        raise UserError(
            f"rope type {kind!r} has other frequencies for every length of a prompt, and one batch has several "
            f"lengths: use batch_size=1"
        )
    if length_changes(model, tokens, longest) is None:
        return
    if kind == "longrope":
        raise UserError(
            f"rope type 'longrope' changes its frequencies between a prompt of {tokens} tokens and the end of its "
            f"answer at {longest}, and what is cached would no longer be right: use shorter prompts, or longer ones"
        )
    if cache.moves:
        raise UserError(
            f"{name} moves keys to other positions, and rope type {kind!r} turns what follows a prompt of {tokens} "
            f"tokens by other frequencies than the prompt: use a method that moves none, e.g. kqsvd or xkv"
        )
