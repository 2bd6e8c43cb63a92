"""Every press of kvpress as a method: its own code and parameters, under the same meter and on the same prompts.

``kvgauge.methods.pressed.kvpress.SnapKVPress`` is a frozen dataclass made from the press of that name: the press's
parameters are its fields, and a budget stands in for the compression ratio.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from transformers import PreTrainedModel

from kvgauge.architecture.facts import ModelFacts
from kvgauge.contract.budget import allowed_nbytes
from kvgauge.contract.fitted import Fitted
from kvgauge.contract.method import Method, Needs, plain_label
from kvgauge.contract.roles import Lossless
from kvgauge.errors import UserError, unknown
from kvgauge.field_types import check
from kvgauge.layers.cache import KVCache
from kvgauge.methods.pressed.kvpress_library import library, parameters, presses
from kvgauge.methods.pressed.layer import PressedCache, describe
from kvgauge.methods.pressed.pressable import check_pressable

GROUP = "kvpress/"

# Presses that other presses are wrapped around, by the parameter that they go to.
WRAPPED = ("press", "presses")
DEFAULT_INNER = "expected_attention"
# Rerotation completes StreamingLLM and blocks KeyDiff, say their documentations; random numbers want a seed.
DEFAULTS: dict[str, dict[str, Any]] = {
    "BlockPress": {"press": "keydiff"},
    "KeyRerotationPress": {"press": "streaming_llm"},
    "LUKVPress": {"press": {"name": "expected_attention", "epsilon": 0.02}},
    "RandomPress": {"seed": 0},
}

# They hide entries from the attention and free none of them.
MASKING = ("AdaKVPress", "CriticalAdaKVPress", "DMSPress", "DuoAttentionPress", "KVzipPress", "LUKVPress", "ThinKPress")
# What they choose for a row depends on the other rows of the batch, or they take only one.
ONE_SEQUENCE = (
    "ChunkKVPress",
    "CompactorPress",
    "CriticalAdaKVPress",
    "KVzipPress",
    "LeverageScorePress",
    "RandomPress",
    "SimLayerKVPress",
)
# Parameters that have to be given, though the press would only find out in the middle of a prefill.
REQUIRED = {"DMSPress": "threshold", "PerLayerCompressionPress": "compression_ratios"}
# What kvpress' DecodingPress is right around. It hands a press a cache in the order of its last scores, and what the
# modules were given of the tokens since then: these score an entry wherever it stands. Others take sinks, windows or
# neighbours by their places (StreamingLLM, SnapKV, LagKV), or count positions from the tokens that they are shown
# (ExpectedAttention).
WHILE_DECODING = ("KeyDiffPress", "KnormPress", "QFilterPress", "RandomPress", "TOVAPress")
# They run the model over the context again.
REPLAYING = ("KVzipPress",)
# What stands in the way of those that cannot run here at all.
REFUSED = {
    "DecodingPress": "it compresses what is generated, and a context is what is compressed here",
    "PrefillDecodingPress": "it compresses what is generated, and a context is what is compressed here",
    "FastKVzipPress": "it needs trained gates and a prefill of its own",
    "FinchPress": "it needs a delimiter token between context and question, and a context is compressed alone here",
    "KVComposePress": "it needs the weights of eager attention and prompts registered by hand",
    "ObservedAttentionPress": "it needs the weights of eager attention, which are never formed here",
    "RestoreKVPress": "it needs trained adapters (PEFT) and adds tokens of its own to the cache",
}


@dataclass(frozen=True, kw_only=True)
class Pressed(Lossless, Method):
    """A press of kvpress; the subclasses are made by ``kvgauge.methods.pressed.kvpress.<class of the press>``.

    Attributes:
        compression_ratio: the press's own, in [0, 1): its nominal share of entries or channels to drop, whatever that
            does to the bytes. It overrides the budget, which is kept to.

    Raises:
        UserError: values that the press refuses, a budget for a press that frees no bytes, a press that cannot run.
    """

    name: str
    compression_ratio: float | None = None

    press_class: ClassVar[type[Any]]

    def __post_init__(self) -> None:
        super().__post_init__()
        ratio = self.compression_ratio
        if ratio is not None and not 0.0 <= ratio < 1.0:
            raise UserError(f"compression_ratio {ratio:g} of {self.name} is outside [0, 1)")
        for name, reason in REFUSED.items():
            if self._is(name):
                raise UserError(f"{self.name} cannot run: {reason}; choose another press")
        if self.budget is not None and self.budget < 1.0 and self._is(*MASKING):
            raise UserError(
                f"{self.name} masks and frees no bytes, so that it reaches no budget of {self.budget:g}: "
                f"give compression_ratio or its own parameters instead"
            )
        if self.every is not None and self.press_class.__name__ not in WHILE_DECODING and not self.keeps_everything:
            known = ", ".join(name for name, cls in presses().items() if cls.__name__ in WHILE_DECODING)
            raise UserError(
                f"{self.name} scores entries by their places or by the whole prompt, which a pruned cache has not: "
                f"leave while_decoding out, or take one of {known}"
            )
        self.new_press()

    def lossless(self, facts: Any) -> Pressed:
        return dataclasses.replace(self, budget=1.0, compression_ratio=None)

    @property
    def label(self) -> str:
        return plain_label(self) if self.compression_ratio is None else f"{self.name}@cr{self.compression_ratio:g}"

    @property
    def needs(self) -> Needs:
        return Needs(
            exact_prefill=not self._is(*REPLAYING),
            sees_inputs=True,
            alone=not self.keeps_everything,  # presses know no padding
            libraries=("kvpress",),
        )

    def nbytes(self, facts: ModelFacts, fitted: Fitted | None, tokens: int) -> int:
        if self._asked_budget is not None:
            return int(allowed_nbytes(self, facts, tokens)) + facts.others_nbytes(tokens)
        masked = self.keeps_everything or self._is(*MASKING)
        return int(facts.full_nbytes(tokens) * (1.0 if masked else 1.0 - (self.compression_ratio or 0.0)))

    @classmethod
    def _is(cls, *names: str) -> bool:
        return any(base.__name__ in names for base in cls.press_class.__mro__)

    @property
    def _asked_budget(self) -> float | None:
        """The budget that has to be kept to; None where there is none, or where everything is kept."""
        return None if self.compression_ratio is not None or self.budget == 1.0 else self.budget

    @property
    def _kept_while_decoding(self) -> float:
        """The share of all tokens that is left by a compression while decoding."""
        return self._asked_budget or 1.0 - (self.compression_ratio or 0.0)

    @property
    def keeps_everything(self) -> bool:
        return self.compression_ratio is None and self.budget == 1.0

    def new_press(self) -> Any:
        """The press, with its ratio; a new one for every cache, as some of them have a memory.

        Raises:
            UserError: the press refuses its parameters, or takes no ratio and is given one.
        """
        press = _build(
            self.name, self.press_class, {name: getattr(self, name) for name in parameters(self.press_class)}
        )
        budget = self._asked_budget
        ratio = self.compression_ratio if budget is None else 1.0 - budget
        if ratio is not None:
            try:
                press.compression_ratio = ratio
            except AttributeError:
                own = ", ".join(parameters(self.press_class))
                raise UserError(f"{self.name} takes no budget and no ratio, its size follows from {own}") from None
        return press

    def new_cache(
        self, model: PreTrainedModel, fitted: Fitted | None = None, *, context_length: int | None = None
    ) -> KVCache:
        check_pressable(self.name, model)
        press = None if self.keeps_everything else self.new_press()
        if press is not None:
            required = REQUIRED.get(self.press_class.__name__)
            if required and getattr(self, required) is None:
                raise UserError(f"{self.name} knows no {required} by itself: give one, e.g. method.{required}=…")
            try:
                press.post_init_from_model(model)
            except Exception as error:  # a download, a table, an assertion: each press has its own
                raise UserError(
                    f"{self.name} has nothing for this model ({describe(error)}): choose another press or model"
                ) from error
        return PressedCache(
            self.name,
            model,
            press,
            budget=self._asked_budget,
            kept=self._kept_while_decoding,
            one_sequence=self._is(*ONE_SEQUENCE),
            rerotates=self._is("KeyRerotationPress"),
            replays=press is not None and self._is(*REPLAYING),
            context_length=context_length,
        ).compress_every(self.every)


def _build(name: str, cls: type[Any], values: Mapping[str, Any]) -> Any:
    """A press from plain values; presses within it are names, or mappings with a name and parameters."""
    built = {key: _inner(name, value) if key in WRAPPED else value for key, value in values.items()}
    try:
        return cls(**built)
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"{name} refuses its parameters ({describe(error)}): see those of {cls.__name__}") from error


def _inner(name: str, value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_inner(name, one) for one in value]
    given = {"name": value} if isinstance(value, str) else dict(value or {})
    inner = str(given.pop("name", ""))
    if inner not in presses():
        raise unknown(f"press within {name}", inner, presses())
    known = _types(presses()[inner]) | {"compression_ratio": float}
    for key, one in given.items():
        if key not in known:
            raise unknown(f"parameter of {inner}", key, known)
        check(one, known[key], f"{key} of {inner} within {name}")
    return _build(inner, presses()[inner], defaults(presses()[inner]) | given)


def defaults(cls: type[Any]) -> dict[str, Any]:
    """The parameters of a press, presses within it as names; what has to be given is None."""
    found = {key: None if value is inspect.Parameter.empty else value for key, value in parameters(cls).items()}
    if "press" in found:
        found["press"] = DEFAULT_INNER
    if "presses" in found:
        found["presses"] = [{"name": DEFAULT_INNER, "compression_ratio": 0.5}]
    return found | DEFAULTS.get(cls.__name__, {})


def _types(cls: type[Any]) -> dict[str, Any]:
    """The types of a press's parameters as its code declares them; presses within it are checked when built."""
    declared = typing.get_type_hints(cls.__init__)
    found = {key: Any if _holds_press(declared.get(key, Any)) else declared[key] for key in parameters(cls)}
    return {key: found[key] | None if value is None else found[key] for key, value in defaults(cls).items()}


def _holds_press(declared: Any) -> bool:
    if isinstance(declared, type) and declared.__module__.startswith(library().__name__):
        return True
    return declared is Any or any(_holds_press(part) for part in typing.get_args(declared))


@cache
def method_class(name: str) -> Any:
    """The method, a subclass of `Pressed`, of a press by its short name, e.g. ``snapkv``.

    Raises:
        UserError: kvpress is not installed, or has no such press.
    """
    if name not in presses():
        raise unknown("press", name, presses())
    cls = presses()[name]
    types = _types(cls)
    own = [
        (key, types[key], dataclasses.field(default_factory=lambda value=value: value))  # type: ignore[misc]
        for key, value in defaults(cls).items()
    ]
    named = ("name", str, dataclasses.field(default=GROUP + name))
    doc = f"`{cls.__name__}` of kvpress, see there."
    space = {"press_class": cls, "__module__": __name__, "__doc__": doc}
    return dataclasses.make_dataclass(
        cls.__name__, [named, *own], bases=(Pressed,), frozen=True, kw_only=True, namespace=space
    )


def __getattr__(attribute: str) -> Any:
    if not attribute.endswith("Press") or attribute.startswith("_"):
        raise AttributeError(attribute)
    for name, cls in presses().items():
        if cls.__name__ == attribute:
            return method_class(name)
    raise AttributeError(f"kvpress {library().__name__} has no {attribute}")
