"""Random prompts, what a method's cache holds of them, and how far logits are apart."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgauge.contract.fitted import Fitted
from kvgauge.contract.method import Method
from kvgauge.layers.cache import KVCache


def random_tokens(batch: int, tokens: int, seed: int = 0) -> Tensor:
    """Seeded token ids (batch, tokens) that every tiny model knows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 259, (batch, tokens), generator=generator)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``‖actual − expected‖ / ‖expected‖``."""
    return float((actual - expected).norm() / expected.norm())


@torch.no_grad()
def compressed_cache(
    method: Method, model: PreTrainedModel, fitted: Fitted | None, ids: Tensor, chunk: int | None = None
) -> KVCache:
    """The cache of a method after a context (batch, tokens), compressed."""
    cache = method.new_cache(model, fitted)
    cache.expect(ids.shape[1])
    for part in ids.split(chunk or ids.shape[1], dim=1):
        model(part, past_key_values=cache)
    cache.compress()
    return cache
