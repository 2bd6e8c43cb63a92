"""Which methods serve a model: each at its lossless setting and at half the bytes, against transformers' own logits.

At half the bytes a cache that can say which keys and values it stands for must answer as transformers' own cache does
when it holds those. A lossless setting forgives a wrong rotation, for undoing it is exact; that is what
`kvgauge.models.gate` looks for by turning keys that the model's own code made, and a method that turns keys refuses a
model whose rotation is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvgauge.architecture.facts import model_facts
from kvgauge.architecture.kinds import own_cache
from kvgauge.architecture.prompt_length import prompt_length
from kvgauge.calibration.collecting import collect
from kvgauge.calibration.moments import Moments
from kvgauge.contract.budget import TOLERANCE, reference_nbytes
from kvgauge.contract.fitted import Fitted
from kvgauge.contract.fitting import learns
from kvgauge.contract.method import Method, budget_in_force
from kvgauge.contract.roles import lossless_of
from kvgauge.errors import UserError
from kvgauge.layers.cache import KVCache
from kvgauge.measure.random_prompts import compressed_cache, random_tokens, relative_error
from kvgauge.methods.registry import build_method, list_methods
from kvgauge.models.gate import require

METHODS: dict[str, dict[str, object]] = {
    "full": {},
    "kqsvd": {},
    "xkv": {},
    "kvslimmer": {},
    "kvquant": {},
    "kvpress/snapkv": {},
}
"""One of every family."""

OTHERS: dict[str, dict[str, object]] = {
    "ksvd": {},
    "eigen": {},
    "single_svd": {},
    "xkv_aware": {},
    "minicache": {"budget": 0.9, "start_layer": 0},  # pairs cannot reach half the bytes
    "mean_merge": {},
    "streaming_llm": {},
    "asymkv": {},
    "quantized_cache": {"budget": None, "bits": 4},
    "compose": {"compose": ["kqsvd", "int8"]},
}
"""What each family has beside it, without presses."""

RIGHT, REFUSED, WRONG, BROKEN = "right", "refused", "wrong", "broken"
CLOSE = 1e-3  # relative, of logits in float32 at a lossless setting
CONTEXT, QUESTION, CHUNK = 384, 11, 150
HALF = 0.5
LONGEST = 160  # characters of another library's error


@dataclass(frozen=True)
class Finding:
    """How a method serves a model.

    Attributes:
        method: its name.
        verdict: `RIGHT`, `REFUSED`, `WRONG` (numbers are off) or `BROKEN` (it stops without saying why).
        reason: in one line; empty where it is right.
        error: of its logits at the lossless setting, relative; None where it has none, or did not come so far.
        ratio: its bytes at half the budget, or what it was asked for, / uncompressed bytes; None for the uncompressed
            cache.
    """

    method: str
    verdict: str
    reason: str = ""
    error: float | None = None
    ratio: float | None = None


def all_methods() -> dict[str, dict[str, object]]:
    """Every method and every press that can run, with what suits a model of few layers."""
    return METHODS | OTHERS | {name: _press_options(name) for name in list_methods("kvpress")}


def _press_options(name: str) -> dict[str, object]:
    """A budget where the press frees bytes, else its own ratio, or nothing."""
    ways: tuple[dict[str, object], ...] = ({"budget": HALF}, {"budget": None, "compression_ratio": HALF})
    for options in ways:
        try:
            build_method(name, **options)
        except UserError:
            continue
        return options
    return {"budget": None}


def findings(model: PreTrainedModel, methods: Mapping[str, Mapping[str, object]] = METHODS) -> list[Finding]:
    """How each method serves a model.

    Args:
        model: in float32, with this package's attention set.
        methods: their names, with parameters.
    """
    try:
        require(model)
    except UserError as error:
        return [Finding(name, REFUSED, str(error)) for name in methods]
    ids = random_tokens(2, CONTEXT + QUESTION, seed=3)
    groups = max(1, min(2, model_facts(model).num_layers))  # xkv shares a subspace among no more layers than there are
    grouped = {name: {"group_size": groups} for name in ("xkv", "xkv_aware")}
    chosen = {name: {**grouped.get(name, {}), **options} for name, options in methods.items()}
    with prompt_length(model, ids.shape[1]), torch.no_grad():
        expected = model(ids).logits[:, CONTEXT:]
        shown = _Moments(model)
        return [_finding(name, options, model, shown, ids, expected) for name, options in chosen.items()]


class _Moments:
    """Calibration moments of random tokens, collected when the first method asks."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._moments: Moments | None = None

    def fitted(self, method: Method) -> Fitted | None:
        if not learns(method):
            return None
        if self._moments is None:
            self._moments = collect(
                self.model, [random_tokens(4, 160, seed=1)], held_out=random_tokens(2, 160, seed=11)
            )
        return method.fit(self._moments, self.model)


def _finding(
    name: str, options: Mapping[str, object], model: PreTrainedModel, shown: _Moments, ids: Tensor, expected: Tensor
) -> Finding:
    error = ratio = None
    asked: dict[str, object] = {"budget": HALF, **options}
    try:
        method = build_method(name, **({} if name == "full" else asked))
        whole = lossless_of(method, model_facts(model))
        if whole is not None:
            error = _error(whole, model, shown.fitted(whole), ids, expected)
            if not error < CLOSE:
                return Finding(name, WRONG, f"logits are off by {error:.1e} where nothing is lost", error)
        if name != "full":
            ratio, apart = _at_half(method, model, shown, ids)
            if apart is None:
                return Finding(name, WRONG, "logits are not finite at half the bytes", error, ratio)
            if apart > CLOSE:
                reason = f"logits are off by {apart:.1e} from those of the keys and values that its cache stands for"
                return Finding(name, WRONG, reason, error, ratio)
            budget = budget_in_force(method)
            if budget is not None and ratio > TOLERANCE * budget:
                return Finding(name, WRONG, f"holds {ratio:.2f} of the bytes where {budget:g} was asked", error, ratio)
    except UserError as refusal:
        return Finding(name, REFUSED, str(refusal), error, ratio)
    except Exception as problem:
        reason = f"{type(problem).__name__}: {' '.join(str(problem).split())[:LONGEST]}"
        return Finding(name, BROKEN, reason, error, ratio)
    return Finding(name, RIGHT, "", error, ratio)


@torch.no_grad()
def _error(whole: Method, model: PreTrainedModel, fitted: Fitted | None, ids: Tensor, expected: Tensor) -> float:
    cache = compressed_cache(whole, model, fitted, ids[:, :CONTEXT], chunk=CHUNK)
    asked = model(ids[:, CONTEXT:-1], past_key_values=cache).logits
    decoded = model(ids[:, -1:], past_key_values=cache).logits
    return relative_error(torch.cat([asked, decoded], dim=1), expected)


@torch.no_grad()
def _at_half(method: Method, model: PreTrainedModel, shown: _Moments, ids: Tensor) -> tuple[float, float | None]:
    """The share of the bytes, and how far logits are from those of what is stored; None where they are not finite."""
    context, question = ids[:1, :CONTEXT], ids[:1, CONTEXT:]
    cache = compressed_cache(method, model, shown.fitted(method), context, chunk=CHUNK)
    ratio = cache.nbytes() / reference_nbytes(method, model_facts(model), CONTEXT)
    logits = model(question, past_key_values=cache).logits
    if not bool(logits.isfinite().all()):
        return ratio, None
    stood_for = _stood_for(cache, model, context)
    apart = 0.0 if stood_for is None else relative_error(logits, model(question, past_key_values=stood_for).logits)
    return ratio, apart


def _stood_for(cache: KVCache, model: PreTrainedModel, context: Tensor) -> Cache | None:
    """transformers' own cache of `context` whose layers answer what follows with what `cache` has made of both.

    None where its entries stand for no single tokens.
    """
    try:
        dense = [cache.dense(layer) for layer in range(len(cache.own))]
    except UserError:
        return None
    own: Cache = own_cache(model.config)
    model(context, past_key_values=own)
    for index, states in zip(model_facts(model).compressed, dense, strict=True):
        own.layers[index].update = partial(_held, states)
    return own


def _held(states: tuple[Tensor, Tensor], *given: object, **options: object) -> tuple[Tensor, Tensor]:
    """What a layer holds, in the place of what it is given."""
    return states
