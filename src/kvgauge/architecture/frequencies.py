"""The rotary frequencies of a model, for caches that turn keys by themselves."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from kvgauge.architecture.facts import model_facts
from kvgauge.architecture.rotary import Rotary
from kvgauge.errors import UserError


def rotary_frequencies(model: PreTrainedModel) -> Tensor:
    """θ of every plane of a head, (head_dim / 2,), radians per position.

    Raises:
        UserError: the model has no rotary embedding, one that depends on the length of the sequence, or one that turns
            only a part of each head.
    """
    Rotary(model)  # refuses what cannot be turned back
    frequencies = getattr(model.get_decoder().rotary_emb, "inv_freq", None)
    head_dim = model_facts(model).head_dim
    if not isinstance(frequencies, Tensor) or 2 * frequencies.numel() != head_dim:
        raise UserError(f"{type(model).__name__} does not rotate whole heads at fixed frequencies: use rope: post")
    return frequencies
