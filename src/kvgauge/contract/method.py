"""The contract of a method."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import PreTrainedModel

from kvgauge import fingerprint
from kvgauge.architecture.facts import ModelFacts
from kvgauge.contract.fitted import Fitted
from kvgauge.errors import UserError
from kvgauge.layers.cache import KVCache
from kvgauge.models.identity import model_fingerprint

if TYPE_CHECKING:
    from kvgauge.calibration.moments import Moments


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A way to compress the cache; subclasses are frozen dataclasses whose fields are the configuration.

    Attributes:
        name: the name under which results are reported.
        budget: cached bytes over the bytes of the uncompressed cache of the same logical length, at the context length
            of the run, in (0, 1]; explicit ranks or entry counts of a method override it. The uncompressed cache holds
            numbers of the model's dtype, or of `reference_bits`.

    Raises:
        UserError: a budget outside (0, 1].
    """

    name: str
    budget: float | None = None

    exact_prefill: ClassVar[bool] = True
    """The prefill attends to exact keys and values, so one prefill serves every such method."""

    sees_inputs: ClassVar[bool] = False
    """Its compression also looks at what the attention modules were given in the prefill (`LayerInputs`)."""

    learns: ClassVar[bool] = False
    """`fit` needs moments and returns projections."""

    fit_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that change what `fit` returns; all others may differ between runs that share a fit."""

    few_settings: ClassVar[bool] = False
    """A budget only picks one of a few settings, e.g. a number of bits, and bytes may lie well below it (`larger`)."""

    def __post_init__(self) -> None:
        if self.budget is not None and not 0.0 < self.budget <= 1.0:
            raise UserError(f"budget {self.budget:g} of {self.name} is outside (0, 1]: give the share of bytes to keep")

    @property
    def reference_bits(self) -> int | None:
        """Bits of a number of the uncompressed cache that bytes are compared with; None for the model's dtype.

        16 for methods that quantise, whatever the dtype of the model: nobody serves 32-bit caches, and against one
        every number of bits would look half as large as it is.
        """
        return None

    def reference_nbytes(self, facts: ModelFacts, tokens: int) -> int:
        """Bytes of the uncompressed cache of `tokens` tokens of one sequence: what the budget is a share of."""
        return facts.full_nbytes(tokens, self.reference_bits)

    def fit(self, moments: Moments, model: PreTrainedModel) -> Fitted | None:
        """What the method learns from calibration moments; None where it learns nothing."""
        return None

    @abstractmethod
    def new_cache(
        self, model: PreTrainedModel, fitted: Fitted | None = None, *, context_length: int | None = None
    ) -> KVCache:
        """An empty cache.

        Args:
            model: the model it will serve.
            fitted: what `fit` returned, for methods that learn.
            context_length: compress by itself after this many tokens; None waits for ``cache.compress()``.

        Raises:
            UserError: `fitted` is missing, or was made for another model.
        """

    def lossless(self, facts: ModelFacts) -> Method | None:
        """This method at full rank or full size, whose cache gives the uncompressed model's logits: the parity gate.

        None for a method that has no such setting.
        """
        return replace(self, budget=1.0)

    def larger(self, cache: KVCache) -> Method | None:
        """The next larger setting than the one that the budget picked for `cache`, for methods of `few_settings`.

        Its bytes exceed the budget. None where there is none.
        """
        return None

    def config(self) -> dict[str, Any]:
        """The fields as JSON-like data."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def fit_config(self) -> dict[str, Any]:
        """The part of the configuration that changes what `fit` returns."""
        return {"method": type(self).__name__} | {name: getattr(self, name) for name in self.fit_fields}

    @property
    def fit_command(self) -> str:
        """The command that fits this method: what it learns, and whether it does, may depend on its fields."""
        changed = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in ("name", "budget") and getattr(self, field.name) != field.default
        }
        settings = (f"'method.{name}={json.dumps(value).replace(chr(34), '')}'" for name, value in changed.items())
        return " ".join([f"python -m pipelines.fit method={self.name}", *settings])

    @property
    def combination(self) -> bool:
        """Made of several papers' ideas, or changed from its paper: the project's own."""
        return False

    @property
    def label(self) -> str:
        """The name of a cell: method and budget."""
        return self.name if self.budget is None else f"{self.name}@{self.budget:g}"

    @property
    def budgeted(self) -> bool:
        """The budget decides: no explicit rank or entry count overrides it, as the label then tells."""
        return self.budget is not None and self.label == f"{self.name}@{self.budget:g}"

    @property
    def fitter(self) -> Method:
        """The method whose `fit` serves this one: itself, or the member of a composition that learns."""
        return self

    def code_version(self) -> str:
        """A hash of the sources that decide what this method's caches do: its file and all that it reaches."""
        return fingerprint.code_version(type(self).__module__)

    def fit_code_version(self) -> str:
        """The same for what `fit` computes."""
        return fingerprint.code_version(type(self).__module__)


def check_fitted(method: Method, model: PreTrainedModel, fitted: Fitted | None) -> Fitted:
    """`fitted`, if it is there and was made for this model by this kind of method.

    Raises:
        UserError: it is missing or belongs to something else.
    """
    if fitted is None:
        raise UserError(f"{method.name} needs fitted projections: run `{method.fit_command}`")
    if fitted.metadata.get("model") != model_fingerprint(model):
        raise UserError(
            f"the projections were fitted for another model ({fitted.metadata.get('model_name', 'unknown')}): "
            f"run collect and fit with this one"
        )
    if fitted.metadata.get("fit_config") != method.fit_config():
        raise UserError(
            f"the projections were fitted with another configuration ({fitted.metadata.get('fit_config')}) "
            f"than {method.name} asks for ({method.fit_config()}): run fit again"
        )
    return fitted


def fit_metadata(method: Method, moments: Moments, model: PreTrainedModel, **learnt: Any) -> dict[str, Any]:
    """What a fit belongs to.

    Args:
        method: whose fit it is.
        moments: it was made of.
        model: they were collected on.
        learnt: what else there is to know.
    """
    return {
        "method": method.name,
        "fit_config": method.fit_config(),
        "model": model_fingerprint(model),
        "model_name": moments.metadata.get("model_name", ""),
        "moments": moments.metadata,
    } | learnt
