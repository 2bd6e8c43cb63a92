"""What merging a pair of adjacent entries costs.

- ``cardinality``: the attention that the two received, times the tokens they stand for (AsymKV, arXiv 2506.05410, and
  its code);
- ``attention``: the attention alone. KVSlimmer's code (arXiv 2603.00907) multiplies by one number that is the same for
  all pairs, which chooses the same pairs;
- ``residual``: how little of an entry's key and value the other entries can stand in for, whoever attends to it;
- ``both``: the sum of ``cardinality`` and ``residual``, each over its mean among the pairs that may be merged.

The first two are discounted by ``exp(−i/γ)`` with the pair's index i behind the start, as in both papers. They cannot
see what nothing has asked for yet: a sentence that the question will need receives no attention while the text is read,
and is merged away. The third asks the entries themselves. With a row per entry of its pre-RoPE key beside its value,
centred and each scaled to unit variance over its head, and ``G = Σ c x xᵀ`` over the tokens of the head,

    cost_i = xᵢᵀ (G + λ I)⁻¹ xᵢ,    λ = RIDGE · trace(G) / dimensions,

the ridge leverage score (Alaoui & Mahoney, NeurIPS 2015): the residual of a soft low-rank fit, in which directions with
less energy than λ count as missing. What is said again and again has a low one, what stands alone a high one. Distances
between adjacent entries do not tell: the digits of a number are near to each other and far from everything else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvgauge.architecture.rotary import Rotary
from kvgauge.methods.merging.merge_entries import Entries

COSTS = ("cardinality", "attention", "residual", "both")
RIDGE = 0.1


def pair_costs(entries: Entries, first: Tensor, cost: str, gamma: float, rotary: Rotary) -> Tensor:
    """The cost of merging each entry with the next.

    Args:
        entries: of one layer.
        first: (batch,), the first entry behind the start.
        cost: one of `COSTS`.
        gamma: γ, in entries.
        rotary: of the layer.

    Returns:
        (batch, entries − 1); infinite where a pair may not be merged.
    """
    parts = [_alone(entries, first, rotary)] if cost in ("residual", "both") else []
    if cost != "residual":
        parts.append(_attention(entries, first, gamma, counted=cost != "attention"))
    allowed = pair_index(parts[0], first) >= 0
    if len(parts) > 1:
        parts = [part / _mean(part, allowed) for part in parts]
    return torch.where(allowed, sum(parts[1:], parts[0]), torch.inf)


def _attention(entries: Entries, first: Tensor, gamma: float, *, counted: bool) -> Tensor:
    """The discounted attention to both entries of each pair, times their tokens if `counted`."""
    attention = entries.shares.sum(dim=1)
    pairs = attention[:, :-1] + attention[:, 1:]
    if counted:
        tokens = entries.cardinalities.to(pairs.dtype)
        pairs = pairs * (tokens[:, :-1] + tokens[:, 1:])
    return pairs * torch.exp(-(pair_index(pairs, first) + 1).clamp(min=1).to(pairs.dtype) / gamma)


def _alone(entries: Entries, first: Tensor, rotary: Rotary) -> Tensor:
    """The leverage scores of both entries of each pair, summed over the heads."""
    alone = leverages(entries, first, rotary).sum(dim=1)
    return alone[:, :-1] + alone[:, 1:]


def _mean(part: Tensor, allowed: Tensor) -> Tensor:
    """(batch, 1): over the allowed pairs of a row."""
    total = torch.where(allowed, part, 0.0).sum(dim=1, keepdim=True)
    return (total / allowed.sum(dim=1, keepdim=True).clamp(min=1)).clamp(min=torch.finfo(part.dtype).tiny)


def pair_index(pairs: Tensor, first: Tensor) -> Tensor:
    """(batch, entries − 1): the index of each pair behind the start, negative where it may not be merged."""
    return torch.arange(pairs.shape[-1], device=pairs.device) - first[:, None]


def leverages(entries: Entries, first: Tensor, rotary: Rotary) -> Tensor:
    """The ridge leverage score of every entry behind the start, (batch, num_key_value_heads, entries); 0 before it."""
    counted = torch.arange(entries.keys.shape[2], device=first.device) >= first[:, None]
    weights = torch.where(counted, entries.cardinalities, 0).to(entries.shares.dtype)[:, None, :, None]
    plain = rotary.shift(entries.keys.to(weights.dtype), -entries.positions)
    parts = [_standardised(rows.to(weights.dtype), weights) for rows in (plain, entries.values)]
    rows = torch.where(weights > 0, torch.cat(parts, dim=-1), 0.0)
    moments = (rows * weights).mT @ rows
    ridge = RIDGE * moments.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    eye = torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)
    ridge = ridge.clamp(min=torch.finfo(moments.dtype).tiny)[..., None, None] * eye
    factor = torch.linalg.cholesky(moments + ridge)
    return torch.linalg.solve_triangular(factor, rows.mT, upper=False).square().sum(dim=-2)


def _standardised(rows: Tensor, weights: Tensor) -> Tensor:
    """Centred, of unit variance over the tokens and dimensions of a head; rows of equal numbers become 0."""
    total = weights.sum(dim=2, keepdim=True).clamp(min=1)
    rows = rows - (rows * weights).sum(dim=2, keepdim=True) / total
    variance = (rows.square() * weights).sum(dim=(2, 3), keepdim=True) / (total * rows.shape[-1])
    return rows * variance.clamp(min=torch.finfo(rows.dtype).tiny).rsqrt()
