"""Which adjacent entries are merged.

A pair costs the attention that its two entries received, times the tokens they stand for, discounted by ``exp(i/γ)``
with the pair's index i behind the start: lowest first (AsymKV, arXiv 2506.05410; KVSlimmer, arXiv 2603.00907).

The published code merges the lowest pairs all at once, overlapping ones included; the entry in the middle of an overlap
then loses the tokens behind it. Here overlaps are resolved in one of two ways. ``chain`` merges every run of chosen
pairs into one entry. ``disjoint`` takes the lowest pair, rules out its two neighbours, and so on.
"""

from __future__ import annotations

import torch
from torch import Tensor

PAIRS = ("chain", "disjoint")


def pair_costs(shares: Tensor, cardinalities: Tensor, first: Tensor, gamma: float) -> Tensor:
    """The cost of merging each entry with the next.

    Args:
        shares: (batch, num_key_value_heads, entries), mean attention of a query to each entry.
        cardinalities: (batch, entries).
        first: (batch,), the first entry behind the start.
        gamma: γ, in entries.

    Returns:
        (batch, entries − 1); infinite where a pair may not be merged.
    """
    attention = shares.sum(dim=1)
    tokens = cardinalities.to(attention.dtype)
    index = torch.arange(shares.shape[-1] - 1, device=shares.device) - first[:, None]
    discount = torch.exp(-(index + 1).clamp(min=1).to(attention.dtype) / gamma)
    cost = (attention[:, :-1] + attention[:, 1:]) * (tokens[:, :-1] + tokens[:, 1:]) * discount
    return cost.masked_fill(index < 0, torch.inf)


def choose_pairs(cost: Tensor, count: Tensor, pairs: str) -> Tensor:
    """The pairs to merge at once: True where an entry is merged with the next.

    Args:
        cost: (batch, entries − 1), infinite where a pair may not be merged.
        count: (batch,), how many merges are wanted; where fewer are possible, all that are.
        pairs: one of `PAIRS`.
    """
    if pairs == "disjoint":
        cost = cost.masked_fill(~disjoint(cost), torch.inf)
    return (ranks(cost) < count[:, None]) & cost.isfinite()


def ranks(cost: Tensor) -> Tensor:
    """The rank of every cost in its row, 0 the lowest; of equal costs the first is the lower."""
    order = cost.argsort(dim=-1, stable=True)
    places = torch.arange(cost.shape[-1], device=cost.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def disjoint(cost: Tensor) -> Tensor:
    """The pairs that a greedy matching takes, lowest cost first, no entry in two pairs.

    A pair is taken unless a cheaper neighbour is. Down a slope of costs this alternates, starting with True at the
    bottom; so a pair is taken where the numbers of steps down to the bottom are even on both sides. That is the greedy
    matching without its loop.
    """
    rank = ranks(cost)
    places = torch.arange(rank.shape[-1], device=rank.device).expand_as(rank)
    return (_descent(rank, places) % 2 == 0) & (_descent(rank.flip(-1), places).flip(-1) % 2 == 0)


def _descent(rank: Tensor, places: Tensor) -> Tensor:
    """Steps from each place down to the left until the rank rises again."""
    falls = torch.zeros_like(rank, dtype=torch.bool)
    falls[..., 1:] = rank[..., :-1] < rank[..., 1:]
    bottom = places.masked_fill(falls, -1).cummax(dim=-1).values
    return places - bottom
