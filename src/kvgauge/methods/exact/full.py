"""The uncompressed cache: the reference that every method is measured against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from kvgauge.architecture.facts import ModelFacts, model_facts
from kvgauge.contract.fitted import Fitted
from kvgauge.contract.method import Method
from kvgauge.contract.roles import Lossless, Projector
from kvgauge.errors import UserError
from kvgauge.layers.building import placed
from kvgauge.layers.cache import KVCache
from kvgauge.layers.exact import ExactLayer
from kvgauge.layers.mla import ExactLatentLayer
from kvgauge.layers.stored import StoredLayer, whole_nbytes
from kvgauge.layers.two_phase import TwoPhaseLayer
from kvgauge.store.storage import EXACT, Storage


@dataclass(frozen=True, kw_only=True)
class Full(Projector, Lossless, Method):
    """Exact keys and values of every token.

    Attributes:
        reserve: tokens to hold room for from the start; the latency stage's preallocated baseline.
        one_pass: after the context, keep the tokens of a dimension side by side and decode with the compiled kernel
            that compressed caches decode with, where there is one; otherwise with torch's attention.

    Raises:
        UserError: a budget below 1, which an uncompressed cache cannot reach.
    """

    name: str = "full"
    reserve: int = 0
    one_pass: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None and self.budget < 1.0:
            raise UserError(
                f"full keeps every byte and cannot reach a budget of {self.budget:g}: use a method that can"
            )

    def lossless(self, facts: ModelFacts) -> Full:
        return replace(self, budget=1.0)

    def new_cache(
        self, model: PreTrainedModel, fitted: Fitted | None = None, *, context_length: int | None = None
    ) -> KVCache:
        facts = model_facts(model)
        kind = ExactLayer if facts.latent is None else ExactLatentLayer
        layers = [kind(self.reserve, dimension_major=self.one_pass) for _ in range(facts.num_layers)]
        return placed(KVCache(layers, context_length=context_length), model).compress_every(self.every)

    def stored_cache(
        self,
        model: PreTrainedModel,
        fitted: Fitted | None,
        storage: Storage,
        sized: Callable[[int], Full],
        *,
        context_length: int | None = None,
    ) -> KVCache:
        if storage is EXACT:
            return self.new_cache(model, fitted, context_length=context_length)
        facts = model_facts(model)
        if facts.latent is not None:
            raise UserError(f"latents (MLA) of {self.name} have no quantised storage: leave the quantiser out")
        layers = [StoredLayer(storage) for _ in range(facts.num_layers)]
        return placed(KVCache(layers, context_length=context_length), model).compress_every(self.every)

    def stored_nbytes(self, facts: ModelFacts, fitted: Fitted | None, storage: Storage, tokens: int) -> int:
        if facts.latent is not None:
            return facts.compressed_nbytes(tokens)
        heads, head_dim = facts.num_key_value_heads, facts.head_dim
        return facts.num_layers * whole_nbytes(storage, heads, head_dim, facts.dtype, tokens)

    def entry_layer(self, model: PreTrainedModel, fitted: Fitted | None, storage: Storage, layer: int) -> TwoPhaseLayer:
        return StoredLayer(storage)
