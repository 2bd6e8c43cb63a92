"""The uncompressed cache: the reference that every method is measured against."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from kvgauge.caches.base import KVCache
from kvgauge.caches.exact import ExactLayer
from kvgauge.caches.mla import ExactLatentLayer
from kvgauge.errors import UserError
from kvgauge.methods.base import Method
from kvgauge.methods.fitted import Fitted
from kvgauge.models.facts import model_facts


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Exact keys and values of every token.

    Attributes:
        reserve: tokens to hold room for from the start; the latency stage's preallocated baseline.

    Raises:
        UserError: a budget below 1, which an uncompressed cache cannot reach.
    """

    name: str = "full"
    reserve: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None and self.budget < 1.0:
            raise UserError(
                f"full keeps every byte and cannot reach a budget of {self.budget:g}: use a method that can"
            )

    def new_cache(
        self, model: PreTrainedModel, fitted: Fitted | None = None, *, context_length: int | None = None
    ) -> KVCache:
        facts = model_facts(model)
        kind = ExactLayer if facts.latent is None else ExactLatentLayer
        return KVCache([kind(self.reserve) for _ in range(facts.num_layers)], context_length=context_length)
