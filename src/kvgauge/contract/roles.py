"""What a method must offer to take part in a composition: see `kvgauge.methods.compose`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from kvgauge.contract.fitted import Fitted
from kvgauge.layers.cache import KVCache
from kvgauge.layers.two_phase import TwoPhaseLayer
from kvgauge.store.storage import EXACT, Storage

if TYPE_CHECKING:
    from typing_extensions import Self

    from kvgauge.architecture.facts import ModelFacts


class Projector(ABC):
    """Decides what is stored of every token, and leaves to a `Storage` how.

    In front of `Method` among the bases it provides `Method.new_cache`.
    """

    def new_cache(
        self, model: PreTrainedModel, fitted: Fitted | None = None, *, context_length: int | None = None
    ) -> KVCache:
        """As `Method.new_cache`, with every number in the model's dtype."""
        return self.stored_cache(model, fitted, EXACT, lambda tokens: self, context_length=context_length)

    @abstractmethod
    def stored_cache(
        self,
        model: PreTrainedModel,
        fitted: Fitted | None,
        storage: Storage,
        sized: Callable[[int], Self],
        *,
        context_length: int | None = None,
    ) -> KVCache:
        """An empty cache; arguments as in `Method.new_cache`.

        Args:
            storage: in what form it keeps its numbers.
            sized: this method at the budget for a context of so many tokens.

        Raises:
            UserError: the storage cannot keep what this method stores of this model.
        """

    @abstractmethod
    def stored_nbytes(self, facts: ModelFacts, fitted: Fitted | None, storage: Storage, tokens: int) -> int:
        """Bytes of one sequence right after the compression of a context of `tokens` tokens, at this method's budget.

        Raises:
            UserError: the budget is too low for this method.
        """

    @abstractmethod
    def entry_layer(self, model: PreTrainedModel, fitted: Fitted | None, storage: Storage, layer: int) -> TwoPhaseLayer:
        """What takes over the merged entries of a layer; every layer has merged others.

        Raises:
            UserError: this method needs the same tokens in every layer.
        """


class Merger(ABC):
    """Decides, while the context is read, which entries there are."""

    @abstractmethod
    def entries(self, tokens: int, facts: ModelFacts) -> int:
        """The most entries of a layer for a context of `tokens` tokens."""

    @abstractmethod
    def bookkeeping_nbytes(self, entries: int, facts: ModelFacts) -> int:
        """Bytes of what is known of the merged entries of one sequence beside their keys and values."""

    @abstractmethod
    def frozen_cache(
        self,
        model: PreTrainedModel,
        sized: Callable[[int], Self],
        freeze: Callable[[int, int], TwoPhaseLayer],
        *,
        context_length: int | None = None,
    ) -> KVCache:
        """An empty cache whose entries are frozen by `compress`; arguments as in `Method.new_cache`.

        Args:
            sized: this method at the budget for a context of so many tokens.
            freeze: (layer, tokens of the context) → what takes over the layer's entries.
        """
