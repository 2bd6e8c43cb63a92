"""Log-probabilities of choices behind a compressed cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgauge.layers.cache import KVCache
from kvgauge.prompts.choices import Likelihood
from kvgauge.prompts.encoding import EncodedChoice


@torch.no_grad()
def likelihoods(
    model: PreTrainedModel,
    logits: Tensor,
    cache: KVCache,
    choices: Sequence[EncodedChoice],
    again: Callable[[], KVCache],
) -> list[Likelihood]:
    """The log-probability of every choice behind one prompt, and whether it is what the model would say.

    Every choice meets the cache as the prompt left it: where the cache cannot forget a choice, it is made again.

    Args:
        model: loaded by `kvgauge.load_model`.
        logits: (1, vocabulary), of the prompt's last token.
        cache: holds the prompt, and is compressed.
        choices: at least one.
        again: makes the cache anew.
    """
    found: list[Likelihood] = []
    fresh = True
    for choice in choices:
        fed = [*choice.rest, *choice.text[:-1]]
        predictions = logits
        if fed:
            if not fresh:
                cache = again()
            forgets = cache.reversible_tokens() >= len(fed)
            ids = torch.tensor([fed], device=model.device)
            behind = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0]
            predictions = torch.cat([logits, behind])
            if forgets:
                cache.crop(-len(fed))
            fresh = forgets
        found.append(_likelihood(predictions[len(choice.rest) :], choice.text))
    return found


def _likelihood(predictions: Tensor, tokens: Sequence[int]) -> Likelihood:
    """Of `tokens` under the logits (tokens, vocabulary) in the place before each of them."""
    wanted = torch.tensor(tokens, device=predictions.device)
    chosen = torch.log_softmax(predictions.float(), dim=-1).gather(1, wanted[:, None]).sum()
    return float(chosen), bool((predictions.argmax(dim=-1) == wanted).all())
