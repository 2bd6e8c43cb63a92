"""Which methods serve a model: each at its lossless setting and at half the bytes, against transformers' own logits.

A lossless setting forgives a wrong rotation, for undoing it is exact; that is what `kvgauge.models.gate` looks for by
turning keys that the model's own code made, and a method that turns keys refuses a model whose rotation is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgauge.architecture.facts import model_facts
from kvgauge.architecture.prompt_length import prompt_length
from kvgauge.calibration.collecting import collect
from kvgauge.calibration.moments import Moments
from kvgauge.contract.budget import TOLERANCE, reference_nbytes
from kvgauge.contract.fitted import Fitted
from kvgauge.contract.fitting import learns
from kvgauge.contract.method import Method
from kvgauge.contract.roles import lossless_of
from kvgauge.errors import UserError
from kvgauge.measure.random_prompts import compressed_cache, random_tokens, relative_error
from kvgauge.methods.registry import build_method
from kvgauge.models.gate import require

METHODS: dict[str, dict[str, object]] = {
    "full": {},
    "kqsvd": {},
    "xkv": {},
    "kvslimmer": {},
    "kvquant": {},
    "kvpress/snapkv": {},
}
"""One of every family, with what suits a model of few layers."""

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
        ratio: its bytes at half the budget / uncompressed bytes; None for the uncompressed cache.
    """

    method: str
    verdict: str
    reason: str = ""
    error: float | None = None
    ratio: float | None = None


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
    groups = min(2, model_facts(model).num_layers)  # xkv shares a subspace among no more layers than there are
    grouped = {"xkv": {"group_size": groups}}
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
    try:
        whole = lossless_of(build_method(name, **options), model_facts(model))
        if whole is not None:
            error = _error(whole, model, shown.fitted(whole), ids, expected)
            if not error < CLOSE:
                return Finding(name, WRONG, f"logits are off by {error:.1e} where nothing is lost", error)
        if name != "full":
            ratio, finite = _at_half(build_method(name, budget=HALF, **options), model, shown, ids)
            if not finite:
                return Finding(name, WRONG, "logits are not finite at half the bytes", error, ratio)
            if ratio > TOLERANCE * HALF and not name.startswith("kvpress/"):
                return Finding(name, WRONG, f"holds {ratio:.2f} of the bytes where half was asked", error, ratio)
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
def _at_half(method: Method, model: PreTrainedModel, shown: _Moments, ids: Tensor) -> tuple[float, bool]:
    cache = compressed_cache(method, model, shown.fitted(method), ids[:1, :CONTEXT], chunk=CHUNK)
    ratio = cache.nbytes() / reference_nbytes(method, model_facts(model), CONTEXT)
    logits = model(ids[:1, CONTEXT:], past_key_values=cache).logits
    return ratio, bool(logits.isfinite().all())
