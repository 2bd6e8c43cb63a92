"""The contract of a method: what it learns, what it stores, and how many bytes that is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from kvgauge.architecture.facts import ModelFacts
from kvgauge.contract.fitted import Fitted
from kvgauge.contract.while_decoding import tokens_between
from kvgauge.errors import UserError
from kvgauge.layers.cache import KVCache

if TYPE_CHECKING:
    from typing_extensions import Self

    from kvgauge.calibration.moments import Moments


@dataclass(frozen=True)
class Needs:
    """What a method asks of those who run it.

    Attributes:
        learns: what changes the result of `Method.fit`, as JSON-like data; all other fields may differ between methods
            that share a fit. None: there is nothing to fit.
        exact_prefill: the prefill attends to exact keys and values, so that one prefill serves every such method.
        sees_inputs: its compression also looks at what the attention modules were given in the prefill (`LayerInputs`).
        reference_bits: bits of a number of the uncompressed cache that bytes are compared with; None for the model's
            dtype. 16 for methods that quantise, whatever the dtype of the model: nobody serves 32-bit caches, and
            against one every number of bits would look half as large as it is.
        alone: a sequence is compressed by itself: the engine answers the prompts of a batch one by one.
        libraries: distributions whose code makes the cache; their versions are part of the method's.
    """

    learns: Mapping[str, Any] | None = None
    exact_prefill: bool = True
    sees_inputs: bool = False
    reference_bits: int | None = None
    alone: bool = False
    libraries: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A way to compress the cache; subclasses are frozen dataclasses whose fields are the configuration.

    What a method can do beyond this are roles, see `kvgauge.contract.roles`.

    Attributes:
        name: the name under which results are reported.
        budget: cached bytes over the bytes of the uncompressed cache of the same logical length, at the context length
            of the run, in (0, 1]; explicit ranks or entry counts of a method override it. The uncompressed cache is
            transformers' own of the model, in numbers of the model's dtype or of `Needs.reference_bits`.
        while_decoding: ``{every: n}``: compress again what has grown, at every multiple of n tokens behind the context;
            the budget then holds for the whole sequence there. None: the context is compressed, once.

    Raises:
        UserError: a budget outside (0, 1], or `while_decoding` with something else than a number from 1 up.
    """

    name: str
    budget: float | None = None
    while_decoding: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        tokens_between(self.name, self.while_decoding)
        if self.budget is not None and not 0.0 < self.budget <= 1.0:
            raise UserError(f"budget {self.budget:g} of {self.name} is outside (0, 1]: give the share of bytes to keep")

    @property
    def every(self) -> int | None:
        """Tokens between two compressions while decoding; None where the context alone is compressed."""
        return tokens_between(self.name, self.while_decoding)

    @property
    def needs(self) -> Needs:
        """What it asks of those who run it."""
        return Needs()

    def fit(self, moments: Moments, model: PreTrainedModel) -> Fitted | None:
        """What the method learns from calibration moments; None where it learns nothing."""
        return None

    @abstractmethod
    def new_cache(
        self, model: PreTrainedModel, fitted: Fitted | None = None, *, context_length: int | None = None
    ) -> KVCache:
        """An empty cache; one that can also compresses `while_decoding` (`KVCache.compress_every`).

        Args:
            model: the model it will serve.
            fitted: what `fit` returned, for methods that learn.
            context_length: compress by itself after this many tokens; None waits for ``cache.compress()``.

        Raises:
            UserError: `fitted` is missing, or was made for another model.
        """

    @abstractmethod
    def nbytes(self, facts: ModelFacts, fitted: Fitted | None, tokens: int) -> int:
        """Bytes of one sequence right after the compression of a context of `tokens` tokens.

        What depends on the numbers themselves (outliers, say) counts as it is expected to be.

        Raises:
            UserError: the budget is too low for this method.
        """

    def sized(self, budget: float) -> Self:
        """This method at another budget."""
        return replace(self, budget=budget)

    @property
    def label(self) -> str:
        """The name of a cell: method and budget, or what overrides the budget."""
        return plain_label(self)

    @property
    def combination(self) -> bool:
        """Made of several papers' ideas, or changed from its paper: the project's own."""
        return False


def plain_label(method: Method) -> str:
    """Name and budget."""
    return method.name if method.budget is None else f"{method.name}@{method.budget:g}"


def budget_in_force(method: Method) -> float | None:
    """The budget; None where explicit ranks or entry counts override it, as the label then tells."""
    return method.budget if method.label == plain_label(method) else None
