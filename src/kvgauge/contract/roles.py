"""What a method may offer beyond the contract: a setting that loses nothing, parts, a place in a composition.

Compositions are in `kvgauge.methods.compose`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from kvgauge.contract.fitted import Fitted
from kvgauge.layers.cache import KVCache
from kvgauge.layers.two_phase import TwoPhaseLayer
from kvgauge.store.storage import EXACT, Storage

if TYPE_CHECKING:
    from typing_extensions import Self

    from kvgauge.architecture.facts import ModelFacts
    from kvgauge.contract.method import Method


class Lossless(ABC):
    """Has a setting whose cache gives the uncompressed model's logits: the parity gate."""

    @abstractmethod
    def lossless(self, facts: ModelFacts) -> Method | None:
        """This method at full rank or full size; None for a composition with a part that always loses."""


def lossless_of(method: Method, facts: ModelFacts) -> Method | None:
    """The method at its lossless setting; None for one that loses at every setting."""
    return method.lossless(facts) if isinstance(method, Lossless) else None


class Composite(ABC):
    """Made of other methods."""

    @property
    @abstractmethod
    def parts(self) -> Sequence[Method]:
        """The methods, in the order in which they work; the code of each is part of this one's."""

    @property
    @abstractmethod
    def fitter(self) -> Method:
        """The part whose `Method.fit` serves the whole."""


def fitter_of(method: Method) -> Method:
    """The method whose fit serves `method`: itself, or a part of it."""
    return fitter_of(method.fitter) if isinstance(method, Composite) else method


class Quantizer(ABC):
    """Keeps numbers in few bits; a budget picks how many, out of a handful.

    Attributes:
        bits: given by the user; None leaves them to the budget.
    """

    bits: float | None

    @property
    @abstractmethod
    def bit_choices(self) -> tuple[float, ...]:
        """Numbers of bits that there is a form for, ascending."""

    @property
    @abstractmethod
    def label(self) -> str:
        """What it is called in a table."""


class StorageQuantizer(Quantizer):
    """A `Quantizer` of whatever numbers others hand it: the last member of a composition."""

    @abstractmethod
    def storage(self) -> Storage:
        """What keeps numbers like this.

        Raises:
            UserError: no number of bits was given.
        """

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The fields as JSON-like data."""


class Projector(ABC):
    """Decides what is stored of every token, and leaves to a `Storage` how.

    In front of `Method` among the bases it provides `Method.new_cache` and `Method.nbytes`.
    """

    def new_cache(
        self, model: PreTrainedModel, fitted: Fitted | None = None, *, context_length: int | None = None
    ) -> KVCache:
        """As `Method.new_cache`, with every number in the model's dtype."""
        return self.stored_cache(model, fitted, EXACT, lambda tokens: self, context_length=context_length)

    def nbytes(self, facts: ModelFacts, fitted: Fitted | None, tokens: int) -> int:
        """As `Method.nbytes`, with every number in the model's dtype."""
        return self.stored_nbytes(facts, fitted, EXACT, tokens) + facts.others_nbytes(tokens)

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

        Of the layers that it compresses alone.

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
