"""Metrics in which the error of keys is an error of scores, and that of values an error of attention outputs.

A key's error e moves the score of a query q by ``q·e``: averaged over queries its square is ``eᵀ C_Q e``. A value's
error moves what head h adds to the residual stream by ``e W_O,h``: summed over the heads that share the value it is
``eᵀ C_W e`` with ``C_W = Σ_h W_O,h W_O,hᵀ``. KQ-SVD (arXiv 2512.05916) finds its pairs in these metrics per head; here
they weigh the subspaces that layers share (xKV, arXiv 2503.18893).

Keys before the rotation meet queries turned by the distance Δ between the two tokens: ``q_iᵀ R(i) … R(j)ᵀ k_j`` asks
``R(Δ) q_i`` of ``k_j``. Over all causal pairs of T tokens, Δ occurs T − Δ times, and the mean of ``R(Δ) C R(Δ)ᵀ`` has a
closed form in the rotary planes.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgauge.architecture.facts import model_facts, output_weight
from kvgauge.architecture.frequencies import rotary_frequencies
from kvgauge.calibration.weighting import Weighting

if TYPE_CHECKING:
    from kvgauge.calibration.moments import Moments

# A root has the inverse square root of this as its condition number: factors are stored in the model's precision, and
# its rounding in the directions that count least must stay below the signal in those that count most.
WEIGHT_FLOOR = 1e-4

# Below this angle over the whole context the closed form cancels, and two terms of its series are exact to 1e-13.
_SERIES = 1e-4


def roots(metric: Tensor) -> tuple[Tensor, Tensor, int]:
    """Symmetric root and inverse root of metrics (…, d, d), in float64, and how many eigenvalues were floored."""
    values, vectors = torch.linalg.eigh((metric.double() + metric.double().mT) / 2)
    floor = values[..., -1:].clamp_min(torch.finfo(torch.float64).tiny) * WEIGHT_FLOOR
    kept = values.clamp_min(floor)
    root = (vectors * kept.sqrt().unsqueeze(-2)) @ vectors.mT
    inverse = (vectors * kept.rsqrt().unsqueeze(-2)) @ vectors.mT
    return root, inverse, int((values < floor).sum())


def distance_phase(angles: Tensor, tokens: int) -> Tensor:
    """Mean of ``exp(iΔφ)`` over the distances Δ of all causal pairs of `tokens` tokens, complex128.

    ``Σ_Δ (T − Δ) z^Δ = T/(1 − z) − z(1 − z^T)/(1 − z)²`` with ``z = exp(iφ)``, divided by the ``T(T + 1)/2`` pairs.

    Args:
        angles: φ, radians per token, float64.
        tokens: T, at least 1.
    """
    small = (angles * tokens).abs() < _SERIES
    phi = torch.where(small, torch.ones_like(angles), angles)
    z, step, whole = torch.polar(torch.ones_like(phi), phi), _one_minus(phi), _one_minus(phi * tokens)
    mean = (tokens / step - z * whole / step**2) / (tokens * (tokens + 1) / 2)
    first, second = (tokens - 1) / 3, tokens * (tokens - 1) / 6  # moments of Δ
    series = torch.complex(1 - angles**2 * second / 2, angles * first)
    return torch.where(small, series, mean)


def _one_minus(phi: Tensor) -> Tensor:
    """``1 − exp(iφ)`` without cancellation."""
    return torch.complex(2 * (phi / 2).sin() ** 2, -phi.sin())


def seen_from_keys(moment: Tensor, frequencies: Tensor, tokens: int, offset: int = 0) -> Tensor:
    """The mean of ``R(Δ + offset) C R(Δ + offset)ᵀ`` over the causal pairs of a context.

    With ``c = x₁ + i x₂`` per rotary plane, C is a Hermitian part ``E[c c*]``, whose entry (a, b) turns by
    ``Δ(θ_a − θ_b)``, and a pseudo-covariance ``E[c cᵀ]``, which turns by ``Δ(θ_a + θ_b)``.

    Args:
        moment: C of queries before the rotation, (…, d, d) float64, halves split as in Llama.
        frequencies: θ, (d / 2,), radians per position.
        tokens: of the context.
        offset: positions that the keys' frame lies before their own.
    """
    theta = frequencies.to(moment.device).double()
    halves = [half.chunk(2, dim=-1) for half in moment.double().chunk(2, dim=-2)]
    (first, upper), (lower, second) = halves
    hermitian = torch.complex(first + second, lower - upper)
    pseudo = torch.complex(first - second, lower + upper)
    for part, angles in ((hermitian, theta[:, None] - theta), (pseudo, theta[:, None] + theta)):
        part *= distance_phase(angles, tokens) * torch.polar(torch.ones_like(angles), angles * offset)
    rows = torch.cat([(hermitian + pseudo).real, (pseudo - hermitian).imag], dim=-1)
    more = torch.cat([(hermitian + pseudo).imag, (hermitian - pseudo).real], dim=-1)
    return torch.cat([rows, more], dim=-2) / 2


def plane_order(head_dim: int) -> Tensor:
    """Where features of `kvgauge.architecture.planes.interleaved` stand in the half-split convention: (head_dim,)."""
    return torch.arange(head_dim).view(2, -1).T.flatten()


def output_moments(model: PreTrainedModel) -> Tensor:
    """``C_W`` of every layer: (layers, num_key_value_heads, head_dim, head_dim), float64, on the CPU."""
    facts = model_facts(model)
    moments = []
    for layer in range(facts.num_layers):
        heads = output_weight(model, layer).detach().double()
        moments.append((heads @ heads.mT).unflatten(0, (facts.num_key_value_heads, -1)).sum(dim=1).cpu())
    return torch.stack(moments)


def score_metrics(moments: Moments, model: PreTrainedModel, rope: str, offset: int = 0) -> Tensor:
    """Mean squared score, ``(s q·k)²``, as a metric of keys: (layers, num_key_value_heads, head_dim, head_dim).

    Args:
        moments: of calibration queries.
        model: whose rotation stands between keys and queries.
        rope: ``post``: of keys as they are cached; ``pre``: of keys before the rotation, in the features' order of
            `kvgauge.architecture.planes.interleaved`, averaged over the causal pairs of a calibration sequence.
        offset: positions that the frame of ``pre`` lies before the keys' own.
    """
    facts, queries = model_facts(model), moments.queries(rope)
    factors = moments.scalings().to(queries).square()[:, None, None, None]
    metric = queries * factors / (moments.tokens * facts.num_key_value_groups)
    if rope == "post":
        return metric
    turned = [
        seen_from_keys(part, rotary_frequencies(model, layer), moments.sequence_length, offset)
        for layer, part in enumerate(metric)
    ]
    order = plane_order(facts.head_dim).to(metric.device)
    return torch.stack(turned)[..., order[:, None], order]


_VALUE_WEIGHTS: weakref.WeakKeyDictionary[PreTrainedModel, Weighting] = weakref.WeakKeyDictionary()


def value_weighting(model: PreTrainedModel) -> Weighting:
    """The weights of the values of every layer, from W_O alone; made once per model."""
    known = _VALUE_WEIGHTS.get(model)
    if known is None:
        root, inverse, _ = roots(output_moments(model))
        known = Weighting(root.float().to(model.device), inverse.float().to(model.device))
        _VALUE_WEIGHTS[model] = known
    return known
